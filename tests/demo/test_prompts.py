"""The shipped prompts: four classes, none of them from a benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.contracts import TRAFFIC_CLASSES
from engine.demo.prompts import read, shipped

SHARED = Path(__file__).parents[3] / "shared" / "prompts"


def test_every_class_has_its_prompts() -> None:
    found = shipped()
    assert set(found) == set(TRAFFIC_CLASSES)
    assert all(len(prompts) == len({p.turns for p in prompts}) == 48 for prompts in found.values())
    assert all(p.traffic_class == name for name, prompts in found.items() for p in prompts)


def test_none_is_a_benchmark_prompt() -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no benchmark prompts at {SHARED}")
    benchmark = {turn for path in SHARED.glob("*.jsonl") for prompt in read(path) for turn in prompt.turns}
    assert len(benchmark) > 300
    assert not {p.turns[0] for prompts in shipped().values() for p in prompts} & benchmark
