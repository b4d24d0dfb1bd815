"""The figures of learning beside serving; the run itself needs an engine and is a benchmark."""

from __future__ import annotations

import numpy as np
import pytest

from engine.bench.learning_cost import Block, _figures


def blocks(slower: float, seed: int = 0) -> list[tuple[Block, Block]]:
    rng, found = np.random.default_rng(seed), []
    for _ in range(12):
        machine = rng.uniform(0.8, 1.5)  # what the machine does meanwhile is the same for both
        seconds = machine * rng.lognormal(0, 0.3, 24)
        noise = rng.uniform(0.99, 1.01, 24)
        found.append((Block(list(slower * seconds * noise), 2.0, 20.0), Block(list(seconds), 0.0, 19.0)))
    return found


@pytest.mark.parametrize("slower", [1.0, 1.2])
def test_the_ratio_is_what_the_learner_did_and_not_the_machine(slower: float) -> None:
    by_name = {f.name: f for f in _figures(blocks(slower), 7, 0)}
    p95 = by_name["ratio:p95:learning/idle"]
    assert p95.value == pytest.approx(slower, rel=0.02)
    assert p95.low <= slower * 1.01
    assert p95.high >= slower * 0.99
    assert by_name["learner_cores"].value == pytest.approx(0.1)
    assert by_name["learner_cpu_s_while_stopped"].value == 0
