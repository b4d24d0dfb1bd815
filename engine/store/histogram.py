"""Sparse log-bucket histograms: percentiles over any window and filter are merges of counts.

Bucket b holds the values in (γ^(b-1), γ^b] with γ = (1 + α) / (1 - α), and stands for 2γ^b / (γ + 1), which is within
the relative error α of every value in it (DDSketch, Masson et al. 2019, arXiv 1908.10693). α = 1 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

ALPHA = 0.01
GAMMA = (1 + ALPHA) / (1 - ALPHA)
SMALLEST = 1e-6
"""Seconds; what is shorter counts as this: a microsecond is below what any clock here can tell."""
_LOG_GAMMA = math.log(GAMMA)


def bucket(value: float) -> int:
    """The bucket of a duration in seconds."""
    return math.ceil(math.log(max(value, SMALLEST)) / _LOG_GAMMA)


def value(index: int) -> float:
    """The duration a bucket stands for, seconds."""
    return 2 * GAMMA**index / (GAMMA + 1)


def upper(index: int) -> float:
    """The upper edge of a bucket, seconds: what Prometheus calls `le`."""
    return GAMMA**index


def count(values: Iterable[float]) -> tuple[list[int], list[int]]:
    """Values → (bucket indices ascending, counts)."""
    counts: dict[int, int] = {}
    for one in values:
        at = bucket(one)
        counts[at] = counts.get(at, 0) + 1
    indices = sorted(counts)
    return indices, [counts[at] for at in indices]


def merge(parts: Iterable[tuple[Sequence[int], Sequence[int]]]) -> dict[int, int]:
    """Many (indices, counts) → one bucket → count."""
    merged: dict[int, int] = {}
    for indices, counts in parts:
        for at, n in zip(indices, counts, strict=True):
            merged[at] = merged.get(at, 0) + n
    return merged


def quantile(histogram: Mapping[int, int], q: float) -> float | None:
    """The q-quantile in seconds: the value at rank floor(q (n - 1)), as numpy's "lower". None of nothing."""
    found = quantiles(histogram, (q,))
    return found[0] if found else None


def quantiles(histogram: Mapping[int, int], qs: Sequence[float]) -> list[float]:
    """Several quantiles in one pass; empty of nothing."""
    if not histogram:
        return []
    indices = np.array(sorted(histogram))
    cumulated = np.cumsum([histogram[int(at)] for at in indices])
    ranks = [math.floor(q * (int(cumulated[-1]) - 1)) for q in qs]
    return [value(int(indices[np.searchsorted(cumulated, rank, side="right")])) for rank in ranks]
