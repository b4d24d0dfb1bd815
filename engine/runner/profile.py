"""What a target pass costs by its rows: what decides whether a longer draft pays."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch

from engine.model.batch import Row, build_batch
from engine.model.kv_cache import KVCache
from engine.runner.runner import Runner

ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
"""Up to sixteen sequences with four drafted tokens each; passes that really run refine it (``StepCosts``)."""


@torch.inference_mode()
def profile_step_costs(
    runner: Runner, rows: Sequence[int] = ROWS, context: int = 128, repeats: int = 4
) -> dict[int, float]:
    """Rows in one target pass (tokens of one sequence after ``context`` others) → median milliseconds.

    Uses a cache of its own, so running requests are not disturbed.
    """
    model, length = runner.model, context + max(rows)
    cache = KVCache(model.config, 1, length, model.dtype, model.device)
    times: dict[int, list[float]] = {count: [] for count in rows}
    for attempt in range(repeats + 1):
        for count in rows:  # interleaved: a slow second of the machine hits all of them
            began = runner.clock()
            row = Row(0, context, [0] * count)
            batch = build_batch([row], [], length, model.config.group_size, model.dtype, model.device)
            model.logits(model.forward(batch, cache)).argmax(-1).tolist()
            if attempt:  # the first warms up
                times[count].append((runner.clock() - began) * 1e3)
    return {count: median(measured) for count, measured in times.items()}
