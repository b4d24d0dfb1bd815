"""Sparse log-bucket histograms: percentiles over any window and filter are merges of counts.

Bucket b holds the values in (γ^(b-1), γ^b] with γ = (1 + α) / (1 - α), and stands for 2γ^b / (γ + 1), which is within
the relative error α of every value in it (DDSketch, Masson et al. 2019, arXiv 1908.10693). α = 1 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ALPHA = 0.01
GAMMA = (1 + ALPHA) / (1 - ALPHA)
SMALLEST = 1e-6
"""Seconds; what is shorter counts as this: a microsecond is below what any clock here can tell."""
LOG_GAMMA = math.log(GAMMA)


def bucket(value: float) -> int:
    """The bucket of a duration in seconds."""
    return math.ceil(math.log(max(value, SMALLEST)) / LOG_GAMMA)


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


@dataclass(frozen=True, slots=True)
class Table:
    """Many histograms over the same buckets: ``counts`` [groups, buckets], the first column being bucket ``first``."""

    first: int
    counts: np.ndarray

    def quantiles(self, qs: Sequence[float]) -> np.ndarray:
        """[groups, qs], at the rank that ``quantiles`` takes; nan for a histogram of nothing."""
        found = np.full((len(self.counts), len(qs)), np.nan)
        if not self.counts.size:
            return found
        cumulated = np.cumsum(self.counts, axis=1)
        total = cumulated[:, -1]
        for column, q in enumerate(qs):
            rank = np.floor(q * (total - 1))
            at = (cumulated > rank[:, None]).argmax(axis=1)
            found[:, column] = np.where(total > 0, 2 * GAMMA ** (self.first + at) / (GAMMA + 1), np.nan)
        return found


def table(groups: Sequence[int], parts: Sequence[tuple[np.ndarray, np.ndarray]], size: int) -> Table:
    """Sparse histograms (indices, counts), each of the group named at its place, merged into ``size`` histograms."""
    if not parts:
        return Table(0, np.zeros((size, 0), dtype=np.int64))
    indices = np.concatenate([part[0] for part in parts]).astype(np.int64)
    counts = np.concatenate([part[1] for part in parts])
    rows = np.repeat(np.asarray(groups, dtype=np.int64), [len(part[0]) for part in parts])
    if not len(indices):
        return Table(0, np.zeros((size, 0), dtype=np.int64))
    first = int(indices.min())
    span = int(indices.max()) - first + 1
    flat = np.bincount(rows * span + indices - first, weights=counts, minlength=size * span)
    return Table(first, np.rint(flat).astype(np.int64).reshape(size, span))


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
