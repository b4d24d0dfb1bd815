"""Planted bad updates: every one is refused, for its own reason. A gate of the blend alone lets some through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from engine.bench.adaptation.sabotage import sabotaged
from engine.contracts import artifact_digest
from engine.learner import gate, soundness
from engine.learner.gate_report import GateReport
from engine.learner.memory import build_memory
from engine.settings import LearnerSettings
from engine.speculation.artifact import load_proposer
from engine.store.repositories.intake import TrainableTrace
from tests.learner.test_gate import TARGET, traffic

Files = dict[str, bytes]


def memory(train: list[TrainableTrace]) -> Files:
    return build_memory(train, TARGET, LearnerSettings())


def judged(candidate: Files, champion: Files, held_out: list[TrainableTrace]) -> GateReport:
    resident = load_proposer(champion, artifact_digest(champion), TARGET.fingerprint)
    return gate.examine(candidate, resident, held_out, TARGET, 0.02, np.random.default_rng(1))


@pytest.fixture(scope="module")
def held_out() -> list[TrainableTrace]:
    return traffic(np.random.default_rng(1), 40)


@pytest.fixture(scope="module")
def champion() -> Files:
    return memory(traffic(np.random.default_rng(2), 3))


@pytest.fixture(scope="module")
def good() -> Files:
    return memory(traffic(np.random.default_rng(3), 120))


def test_the_good_update_that_they_spoil_passes(good: Files, champion: Files, held_out: list[TrainableTrace]) -> None:
    assert judged(good, champion, held_out).passed


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("shuffled vocabulary", "no certain gain"),
        ("learning rate x100", "no certain gain"),
        ("one class ruined", "may lose"),
        ("not finite", "not finite"),
        ("stale fingerprint", "made for target"),
        ("cut short", "does not load"),
    ],
)
def test_a_planted_bad_update_is_refused(
    kind: str, reason: str, good: Files, champion: Files, held_out: list[TrainableTrace]
) -> None:
    report = judged(dict(sabotaged(good, np.random.default_rng(4)))[kind], champion, held_out)
    assert not report.passed
    assert any(reason in said for said in report.reasons), report.reasons


def test_a_tenth_of_garbage_is_no_progress(held_out: list[TrainableTrace]) -> None:
    """The champion's own traces, a tenth of them poisoned: real contexts, each followed by other contexts' tokens."""
    rng = np.random.default_rng(5)
    train = traffic(np.random.default_rng(2), 20)
    poisoned = [
        replace(trace, output_ids=rng.permutation(trace.output_ids).tolist()) if n % 10 == 0 else trace
        for n, trace in enumerate(train)
    ]
    report = judged(memory(poisoned), memory(train), held_out)
    assert not report.passed
    assert "no certain gain" in report.reasons[0]


def test_a_ruined_class_hides_in_the_blend(held_out: list[TrainableTrace]) -> None:
    """The mutant of the gate: without the rule per class this update would pass."""
    mostly = ("chat", "chat", "chat", "code")
    rng = np.random.default_rng(6)
    train, judges = traffic(rng, 160, mostly), traffic(rng, 80, mostly)
    code = [trace for trace in train if trace.traffic_class == "code"]
    wrong = [replace(t, output_ids=rng.permutation(t.output_ids).tolist()) for t in code]
    spoiled = memory([*(t for t in train if t.traffic_class == "chat"), *wrong])
    report = judged(spoiled, memory(code[:6]), judges)
    assert report.overall is not None
    assert report.overall.low > 0
    assert [said for said in report.reasons if "class code may lose" in said] == list(report.reasons)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_seen_in_every_dtype(dtype: torch.dtype, bad: float) -> None:
    weight = torch.tensor([1.0, bad, -2.0]).to(dtype)
    assert soundness.faults({"draft.safetensors": save_torch({"w": weight})}) == [
        "draft.safetensors: w holds 1 numbers that are not finite, of 3"
    ]
    largest = torch.finfo(dtype)
    weight = torch.tensor([largest.max, largest.min], dtype=dtype)
    assert not soundness.faults({"draft.safetensors": save_torch({"w": weight})})


def test_whole_numbers_are_not_taken_for_floats() -> None:
    keys = save({"k": np.array([2**64 - 1], np.uint64)})
    assert not soundness.faults({"memory.safetensors": keys, "manifest.json": b"{}"})
