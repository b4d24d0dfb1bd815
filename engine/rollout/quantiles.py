"""Comparing latency quantiles of two arms from their log histograms, at every look.

What is counted are assignment keys, which were randomised, not requests: a key weighs one, and each of its m requests
1/m (``store.repositories.evidence``). Requests of one key are alike; taken for independent, ten of them would look like
ten times the evidence. The share Z of a key's requests beyond a threshold lies in [0, 1], and its distribution over
keys is what both methods test. ``certified`` stays an e-process: (q/p)^Z·((1−q)/(1−p))^(1−Z) is convex in Z, so its
expectation under E Z ≤ p < q is largest for Z in {0, 1}, where it is at most 1. For ``fast`` p(1−p) bounds the variance
of Z. With one request per key nothing changes. Quantiles are those of keys: a client of a thousand requests is one.

``certified`` is an e-process by a theorem; ``fast`` needs fewer requests and is calibrated by simulation with identical
arms (`slipstream bench rollouts`). Both ask the same question: is the canary's p-quantile more than (1 + margin) times
the control's? Histograms are dense count arrays over the same consecutive buckets (``dense``); latencies in one replica
share its batches, so what is compared is two arms under one load, and a canary that slows everybody slows its control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log
from typing import Any

import numpy as np

from engine.rollout.statistics import Difference, log_upper_beta
from engine.store import histogram
from engine.store.histogram import LOG_GAMMA

Counts = tuple[Sequence[int], Sequence[float]]
"""A sparse histogram: (bucket indices ascending, keys)."""
Array = np.ndarray[Any, np.dtype[np.float64]]
PRIOR = {0.5: 10.0}
"""Strength (pseudo-requests) of the beta mixture; the best of 2–300 by simulation at p50, at p95 it is 30."""
WINDOW, OUTER = 2.0, 2.8
"""How far the order-statistic spacings reach, in standard deviations of the rank: to both sides, and to that to which a
quantile must be wrong for an equal canary to be blamed. The boundary is crossed at four to five deviations of the
difference, so of about three in each arm: a gap between modes that begins beyond two of them must be seen. By
simulation 2.8 keeps identical arms with a rare long class, and costs nothing where latencies have one mode; 3.3 and 4
take 12 and 26 % more requests."""
MIN_TAIL = 8.0
"""``fast`` says nothing while fewer requests than this are expected beyond the quantile in an arm."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Dense histograms of both arms; ``first`` is the index of bucket 0."""

    canary: Array
    control: Array
    first: int


def dense(canary: Counts, control: Counts) -> Pair | None:
    """Both arms over the same buckets; None where either has no request."""
    if not len(canary[0]) or not len(control[0]):
        return None
    first = min(canary[0][0], control[0][0])
    size = max(canary[0][-1], control[0][-1]) - first + 1
    arms = np.zeros((2, size))
    for arm, (indices, counts) in zip(arms, (canary, control), strict=True):
        arm[np.asarray(indices) - first] = counts
    return Pair(arms[0], arms[1], int(first))


def certified(pair: Pair, p: float, margin: float) -> float:
    """log E against "the canary's p-quantile is at most (1 + margin) times the control's". Counts need not be whole.

    Howard and Ramdas, arXiv 1906.09712, theorem 5, one-sided: were the null true with the control's quantile in the
    bucket (e_{j−1}, e_j], then P(control > e_{j−1}) ≥ 1−p and P(canary > (1 + margin)·e_j) ≤ 1−p, so the product of
    two mixture e-processes, one per arm, is one as well; the quantile is unknown, hence the minimum over the buckets:
    log E = min_j [mix(S_canary((1 + margin)·e_j) > 1−p) + mix(S_control(e_{j−1}) < 1−p)].
    """
    tail, strength = 1.0 - p, PRIOR.get(p, 30.0)
    shift = ceil(log(1.0 + margin) / LOG_GAMMA - 1e-9)
    n_canary, n_control = pair.canary.sum(), pair.control.sum()
    above = np.concatenate([[n_control], n_control - np.cumsum(pair.control)])  # control above the lower edge of j
    over = n_canary - np.cumsum(pair.canary)  # canary above the upper edge of j
    over = np.concatenate([over[shift:], np.zeros(min(shift, len(over)) + 1)])[: len(above)]

    def at(j: Any) -> Any:
        worse = _mixture(over[j], n_canary, tail, strength)
        return worse + _mixture(n_control - above[j], n_control, p, strength)

    usual = int(np.searchsorted(np.cumsum(pair.control), p * n_control))
    here = float(at(usual))
    if here < 0:  # the minimum is lower still, and no evidence either way
        return here
    changes = np.concatenate([[True], (np.diff(above) != 0) | (np.diff(over) != 0)])
    return float(np.min(at(np.flatnonzero(changes))))


def _mixture(k: Any, n: float, share: float, strength: float) -> Any:
    """log E of "more than ``share`` of n requests" given that k did, over beta(strength·share, …) cut to (share, 1)."""
    a, b = strength * share, strength * (1.0 - share)
    k = np.asarray(k, float)
    evidence = log_upper_beta(k + a, n - k + b, share) - log_upper_beta(a, b, share)
    return evidence - k * np.log(share) - (n - k) * np.log1p(-share)


def fast(pairs: Sequence[Pair | None], p: float, margin: float, outer: float = OUTER) -> Difference:
    """How much smaller log quantiles are on the canary than allowed, for ``log_e_below``: one entry per segment.

    estimate = log((1 + margin)·q_control) − log(q_canary). With d = √(np(1−p)), the deviation of the rank r = np, a
    standard error is the larger of two order-statistic spacings on the log scale (Woodruff 1952),
    (log q(r + 2d) − log q(r − 2d)) / 4 and |log q(r ± 2.8d) − log q(r)| / 2.8, down for the canary and up for the
    control; the variance within a bucket comes to it. A spacing to both sides alone breaks where p lies at the end of a
    mode: it averages the gap with the mode, or ends before it. No theorem covers sequential quantiles this way: it is
    calibrated on identical arms. ``outer`` 0 leaves the one to both sides alone, as decisions were made before.
    """
    rows = [(0.0, 0.0, 0.0) if pair is None else _row(pair, p, margin, outer) for pair in pairs]
    estimate, se, n = (np.array(column) for column in zip(*rows, strict=True))
    return Difference(estimate, se, n)


def _row(pair: Pair, p: float, margin: float, outer: float) -> tuple[float, float, float]:
    n = (float(pair.canary.sum()), float(pair.control.sum()))
    if min(n) * min(p, 1.0 - p) < MIN_TAIL:
        return 0.0, 0.0, 0.0
    slow, slow_se = _log_quantile(pair.canary, p, -outer)
    usual, usual_se = _log_quantile(pair.control, p, outer)
    harmonic = 2.0 * n[0] * n[1] / (n[0] + n[1])
    return usual + log(1.0 + margin) - slow, float(np.hypot(slow_se, usual_se)), harmonic


def _log_quantile(counts: Array, p: float, outer: float) -> tuple[float, float]:
    """The logarithm of a quantile (from the first bucket's lower edge) and its standard error.

    ``outer``: how far the spacing to one side reaches, in deviations of the rank, downwards where negative.
    """
    cumulated = np.cumsum(counts)
    n = cumulated[-1]
    deviation = np.sqrt(n * p * (1.0 - p))
    most = min(n * p, n * (1.0 - p)) - 0.5
    width, reach = min(WINDOW * deviation, most), min(abs(outer) * deviation, most)
    low, middle, high, far = _log_at(cumulated, n * p + np.array([-width, 0.0, width, np.copysign(reach, outer)]))
    spacing = max((high - low) / (2.0 * width), abs(far - middle) / reach if reach else 0.0) * deviation
    return float(middle), float(np.hypot(spacing, LOG_GAMMA / np.sqrt(12.0)))


def _log_at(cumulated: Array, ranks: Array) -> Array:
    """Ranks → logarithms of values, linear inside a bucket."""
    j = np.searchsorted(cumulated, ranks)
    before = np.where(j > 0, cumulated[np.maximum(j - 1, 0)], 0.0)
    inside = (ranks - before) / np.maximum(cumulated[j] - before, 1e-9)
    return np.asarray((j + inside) * LOG_GAMMA)


def order_statistic(counts: Counts, p: float, deviations: float) -> float:
    """Seconds at the rank np + ``deviations`` · √(np(1−p)): a bound of the p-quantile whatever the distribution."""
    indices, keys = counts
    cumulated = np.cumsum(keys)
    n = float(cumulated[-1])
    rank = min(max(n * p + deviations * np.sqrt(n * p * (1.0 - p)), 0.5), n - 0.5)
    return histogram.value(int(indices[int(np.searchsorted(cumulated, rank))]))


def curve(counts: Mapping[int, float], points: int = 99) -> tuple[Array, Array]:
    """(quantile levels, seconds) of a histogram, for drawing: what ``_log_at`` makes of evenly spaced ranks."""
    indices = sorted(counts)
    if not indices:
        return np.array([]), np.array([])
    line = np.zeros(indices[-1] - indices[0] + 1)
    line[np.array(indices) - indices[0]] = [counts[at] for at in indices]
    levels = np.linspace(0.01, 0.99, points)
    logs = _log_at(np.cumsum(line), levels * line.sum())
    return levels, np.exp(logs + (indices[0] - 1) * LOG_GAMMA)
