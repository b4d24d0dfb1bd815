"""The comparison behind the auditor's bound: passes of every shape see the same tokens at the same positions."""

from __future__ import annotations

from engine.bench import ties
from engine.model.loading import Target

PROMPTS = [(5, 9, 5, 9, 30), (40, 41, 42), (7,) * 19]


def test_in_float64_all_passes_agree(tiny: Target) -> None:
    pairs = ties.serve(tiny, PROMPTS, 14)
    assert sorted(prompt for prompt, _ in pairs) == sorted(PROMPTS)
    seen = ties.compare(tiny.model, pairs)
    assert len(seen.margins) == sum(len(output) for _, output in pairs)
    assert seen.gaps == []
    assert set(seen.differences) == {"alone", "batch", "verify"}
    assert all(difference < 1e-9 for difference in seen.differences.values())


def test_a_token_that_is_not_the_targets_own_is_a_gap(tiny: Target) -> None:
    (prompt, output), *_ = ties.serve(tiny, PROMPTS[:1], 14)
    wrong = (*output[:5], (output[5] + 1) % 256, *output[6:])
    seen = ties.compare(tiny.model, [(prompt, wrong)])
    assert seen.gaps
    assert max(seen.gaps) > 1e-3
    figures = {figure.name: figure.value for figure in ties._figures("float64", seen, 1e-9)}
    assert figures["served_differs:float64"] == len(seen.gaps) / len(wrong)
    assert figures["gap_max:float64"] == max(seen.gaps)
