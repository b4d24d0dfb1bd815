"""What drafts cost, in milliseconds of target passes, by the engine's own measurement. Pure.

c(rows) is the measured cost of a target pass, linear between measurements and level outside them. A step that drafted d
tokens verifies 1 + d rows; ``drafted_per_pos`` says how many steps drafted at least d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.contracts import SpecCounts


def plain_ms(step_cost_ms: Mapping[int, float]) -> float:
    """Milliseconds per token of plain decoding: c(1)."""
    return float(_cost(np.ones(1), step_cost_ms)[0])


def verify_ms(counts: SpecCounts, step_cost_ms: Mapping[int, float]) -> float:
    """Σ over steps of c(1 + drafted)."""
    if not counts.steps:
        return 0.0
    reached = np.array([counts.steps, *counts.drafted_per_pos, 0], float)
    exactly = reached[:-1] - reached[1:]  # steps that drafted exactly 0, 1, 2, …
    return float(exactly @ _cost(1.0 + np.arange(len(exactly)), step_cost_ms))


def ms_per_token(counts: Sequence[SpecCounts], step_cost_ms: Mapping[int, float]) -> float:
    """Milliseconds of target passes per emitted token, one request at a time; c(1) where nothing was decoded."""
    tokens = sum(one.steps + one.accepted for one in counts)
    if not tokens:
        return plain_ms(step_cost_ms)
    return sum(verify_ms(one, step_cost_ms) for one in counts) / tokens


def _cost(rows: np.ndarray, step_cost_ms: Mapping[int, float]) -> np.ndarray:
    known = np.array(sorted(step_cost_ms), float)
    return np.interp(rows, known, [step_cost_ms[int(r)] for r in known])
