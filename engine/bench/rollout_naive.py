"""Two rules that people write by hand, on the same traffic, so that one sees that the simulation can see."""

from __future__ import annotations

import numpy as np

from engine.bench.rollout_world import Arm
from engine.rollout import statistics
from engine.rollout.statistics import Moments

WINDOW, STRIKES, TOLERATED = 200, 4, 1.10
"""The threshold: the fourth window of 200 requests whose p95 is a tenth higher rolls back."""


def naive_window(arms: tuple[Arm, Arm]) -> int | None:
    """When the threshold on windows would have rolled back, requests per arm."""
    canary, control = (arm.latency[: len(arm.latency) // WINDOW * WINDOW].reshape(-1, WINDOW) for arm in arms)
    above = np.quantile(canary, 0.95, axis=1) > TOLERATED * np.quantile(control, 0.95, axis=1)
    hits = np.flatnonzero(np.cumsum(above) >= STRIKES)
    return int((hits[0] + 1) * WINDOW) if len(hits) else None


def naive_peek(arms: tuple[Arm, Arm], at: np.ndarray) -> int | None:
    """When a one-sided z-test of tokens per step at 5 %, looked at every time, would have rolled back."""
    canary, control = (Moments(*(arm.sums.sum(1)[:, k] for k in range(1, 7))) for arm in arms)
    diff = statistics.difference(canary, control)
    hits = np.flatnonzero((diff.estimate < -1.645 * diff.se) & (at >= 20))
    return int(at[hits[0]]) if len(hits) else None
