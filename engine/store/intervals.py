"""Intervals of what rollups know: ratios of sums, percentiles of histograms, and the difference of two estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054
EPSILON = 1e-9
FEWEST_BINS = 5
"""A spread between fewer time bins says nothing."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % interval; ``low`` and ``high`` are None where too little is known for one."""

    value: float
    low: float | None = None
    high: float | None = None

    def shifted(self, by: float) -> Estimate:
        low, high = (None if bound is None else bound + by for bound in (self.low, self.high))
        return Estimate(self.value + by, low, high)


def ratio(over: Sequence[float], under: Sequence[float]) -> Estimate | None:
    """Σ over / Σ under with time bins as the unit; None where there is nothing to divide by.

    Requests of one minute share a batch, so they are no independent observations: the linearised variance of a ratio
    is taken between bins (Cochran, Sampling Techniques, 1977, chapter 6), with Student's t for their number.
    """
    x, y = np.asarray(over, float), np.asarray(under, float)
    x, y = x[y > 0], y[y > 0]
    if not len(y):
        return None
    value = float(x.sum() / y.sum())
    bins = len(y)
    if bins < FEWEST_BINS:
        return Estimate(value)
    from scipy.stats import t

    # Bins that are all alike have no spread to judge by: a difference to them is not certain for that.
    deviation = math.sqrt(bins / (bins - 1) * float(((x - value * y) ** 2).sum())) / float(y.sum())
    if not deviation > EPSILON * abs(value):
        return Estimate(value)
    half = float(t.ppf(0.975, bins - 1)) * deviation
    return Estimate(value, value - half, value + half)


def quantile_ranks(q: float, n: int) -> tuple[float, float] | None:
    """The levels whose quantiles bound the q-quantile of n observations (Woodruff 1952); None where n is too small."""
    half = Z95 * math.sqrt(q * (1 - q) / n) if n else math.inf
    low, high = q - half, q + half
    return (low, high) if low > 0 and high < 1 else None


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a − b of two independent estimates, by variance recovery (Zou and Donner 2008), which keeps skewed intervals."""
    value = a.value - b.value
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Estimate(value)
    if a.low == a.high or b.low == b.high:  # known of nothing but itself, like an interval that there is not
        return Estimate(value)
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    return Estimate(value, low, high)
