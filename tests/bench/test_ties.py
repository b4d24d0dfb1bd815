"""The comparison behind the auditor's bound: passes of every shape see the same tokens at the same positions."""

from __future__ import annotations

import numpy as np
import pytest

from engine.bench import ties
from engine.model.loading import Target

PROMPTS = [(5, 9, 5, 9, 30), (40, 41, 42), (7,) * 19]


def test_in_float64_all_passes_agree(tiny: Target) -> None:
    pairs = ties.serve(tiny, PROMPTS, 14)
    assert sorted(prompt for prompt, _ in pairs) == sorted(PROMPTS)
    seen = ties.compare(tiny.model, pairs)
    assert [len(margins) for margins in seen.margins] == [len(output) for _, output in pairs]
    assert seen.gaps == [[], [], []]
    assert set(seen.differences) == {"alone", "batch", "verify"}
    assert all(difference < 1e-9 for difference in seen.differences.values())


def test_a_token_that_is_not_the_targets_own_is_a_gap(tiny: Target) -> None:
    (prompt, output), *_ = ties.serve(tiny, PROMPTS[:1], 14)
    wrong = (*output[:5], (output[5] + 1) % 256, *output[6:])
    seen = ties.compare(tiny.model, [(prompt, wrong)])
    (gaps,) = seen.gaps
    assert max(gaps) > 1e-3
    figures = {f.name: f for f in ties._figures("float64", seen, 1e-9, np.random.default_rng(0))}
    assert figures["served_differs:float64"].value == len(gaps) / len(wrong)
    assert (figures["gap_max:float64"].value, figures["gap_max:float64"].high) == (max(gaps), np.inf)
    assert figures["audits_failed:float64"].value == 1.0


def test_intervals_are_of_responses_and_never_of_nothing() -> None:
    """Forty tokens that differ in one response are one observation, and none in thirty is not never."""
    seen = ties.Seen([[0.1] * 40, *([] for _ in range(29))], [[0.2] * 40 for _ in range(30)])
    figures = {f.name: f for f in ties._figures("x", seen, 0.5, np.random.default_rng(0))}
    differs, failed = figures["served_differs:x"], figures["audits_failed:x"]
    assert differs.value == pytest.approx(1 / 30)
    assert differs.low == 0.0
    assert differs.high > 0.09
    assert (failed.value, failed.n) == (0.0, 30)
    assert failed.high == pytest.approx(1 - 0.025 ** (1 / 30))
    seen = ties.Seen([[] for _ in range(30)], seen.margins)
    figures = {f.name: f for f in ties._figures("x", seen, 0.5, np.random.default_rng(0))}
    assert figures["served_differs:x"].high == pytest.approx(failed.high)
    assert figures["best_two_within_bound:x"].value == 1.0
