"""What a target pass costs by its rows: what decides whether a longer draft pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from engine.runner.runner import Runner

ROWS = (1, 8, 4, 16, 2, 32, 3, 12, 24, 6, 64, 48, 18, 5, 7, 20, 19, 17, 13, 10, 14, 9, 15, 11, 22, 25, 28, 30, 31, 40)
"""Up to sixteen sequences with four drafted tokens each; passes that really run refine it (``StepCosts``). Those that
say most come first: a large target on a slow machine may have time for no more. Products go by tiles of a few rows, so
where a pass is small nearly every count is looked at: between 16 and 18 rows one may cost a fortieth of a pass, from 18
to 19 a twelfth, and a drafted token beside sixteen requests is worth a sixteenth (docs/log.md)."""
LEAST = 2
"""Row counts that are profiled however long they take: from one alone, rows would look free."""

CONTEXT = 128
"""Tokens before the rows of a profiled pass."""


@torch.inference_mode()
def profile_step_costs(
    runner: Runner, rows: Sequence[int] = ROWS, context: int = CONTEXT, repeats: int = 4, budget_s: float = 10.0
) -> dict[int, float]:
    """Rows in one target pass (tokens of one sequence after ``context`` others) → milliseconds, never fewer for more.

    The least of all passes, ``repeats`` and a first one: what else a machine does makes a pass longer, and only the
    shape decides anything. No pass begins after ``budget_s`` but those of the first ``LEAST`` row counts, and after
    half of it no further count begins, so that those there are can be repeated; what there was no time or is no room
    for is left out. Running requests are not disturbed.
    """
    rows = [count for count in rows if count <= runner.target_pass.most_rows]
    one_pass = runner.target_pass.trial(context, max(rows))

    def seconds(count: int) -> float:
        began = runner.work_clock()
        one_pass(count)
        return runner.work_clock() - began

    began = runner.clock()
    seconds(rows[0])  # the very first pass sets things up
    least: dict[int, float] = {}
    for count in rows:
        if len(least) >= LEAST and runner.clock() >= began + budget_s / 2:
            break
        least[count] = seconds(count)
    for count in [*least] * repeats:  # interleaved: a slow second of the machine hits all of them
        if runner.clock() >= began + budget_s:
            break
        least[count] = min(least[count], seconds(count))
    return rising({count: took * 1e3 for count, took in least.items()})


def rising(costs: Mapping[int, float]) -> dict[int, float]:
    """Isotonic regression: a pass cannot get cheaper by more rows. Where noise says so neighbours are averaged, or K
    control would be steered by that noise."""
    from scipy.optimize import isotonic_regression  # half a second

    counts = sorted(costs)
    return dict(zip(counts, isotonic_regression([costs[count] for count in counts]).x.tolist(), strict=True))
