"""Has the traffic changed, and has acceptance? Pure: counts and numbers in, findings out.

Drift is a diagnosis and never a reason to roll back: that is decided by canary against control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2

ALARM_K, ALARM_H = 0.1, 50.0
"""Of the CUSUM, in standard deviations: 1.7 % false alarms in 20,000 requests."""
IN_CONTROL = 5_000
"""Requests it takes to know mean and deviation well enough: with fewer the CUSUM refuses to arm."""
AFTER = 2_000
"""Requests after the alarm that help to say when the change began and how large it is."""
SEGMENT = 100
"""In-control requests of a class; a rarer class is left out of the CUSUM."""
NEW_SHARE = 0.02
LARGE = 0.05
"""A PSI under this changes little, however sure it is."""
SLIDE = 0.05
"""A slow slide is reported from this loss of accepted tokens per step on."""
SLIDE_HOURS = 12
DEAD, DEAD_DRAFTED = 0.005, 100
"""Share of the drafted tokens that is accepted under which a draft is dead, and how many it takes to say so."""


@dataclass(frozen=True, slots=True)
class Shift:
    """Population stability index of two histograms over the same bins, and what chance alone reaches."""

    psi: float
    threshold: float
    n: int

    @property
    def is_drift(self) -> bool:
        return self.psi > self.threshold and self.psi >= LARGE


@dataclass(frozen=True, slots=True)
class Change:
    """The CUSUM crossed its bound at request ``alarm`` (an index), the change having begun at about ``onset``.

    ``before`` and ``after``: mean of what is watched, in control and since the onset, over the same mix of classes.
    """

    alarm: int
    onset: int
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Slide:
    """A straight line through hourly values: ``lost`` from its begin to its end, in units of the value, and its t."""

    lost: float
    t: float
    start: float


def psi(reference: Sequence[float] | np.ndarray, now: Sequence[float] | np.ndarray, level: float = 0.95) -> Shift:
    """PSI = Σ (p − q) ln(p / q). Without drift it is (1/n + 1/m) χ² with B − 1 degrees of freedom, so its threshold
    falls with the number of requests; the folklore of 0.1 and 0.25 alarms on 40 % of samples of 100.

    Half a count is added to every bin, so that an empty one is not infinitely surprising.
    """
    q, p = (np.asarray(counts, dtype=float) for counts in (reference, now))
    used = (q + p) > 0
    q, p = q[used], p[used]
    n, m = q.sum(), p.sum()
    if len(q) < 2 or n == 0 or m == 0:
        return Shift(0.0, float("inf"), int(m))
    q, p = ((counts + 0.5) / (counts + 0.5).sum() for counts in (q, p))
    value = float(((p - q) * np.log(p / q)).sum())
    return Shift(value, float(chi2.ppf(level, len(q) - 1) * (1 / n + 1 / m)), int(m))


def new_members(reference: Mapping[str, float], now: Mapping[str, float], share: float = NEW_SHARE) -> dict[str, float]:
    """Members with at least this share of today's requests that the reference has hardly seen: not a tenth as often."""
    whole, before = sum(now.values()), max(sum(reference.values()), 1)
    return {
        name: n / whole
        for name, n in now.items()
        if n >= share * whole and reference.get(name, 0) / before < 0.1 * n / whole
    }


def change_point(
    values: np.ndarray, segments: np.ndarray, in_control: int = IN_CONTROL, k: float = ALARM_K, h: float = ALARM_H
) -> Change | str | None:
    """Two-sided CUSUM over ``values`` [requests] in order, standardised within each segment (Page 1954).

    Centring by segment keeps a mere change of mix silent. The first ``in_control`` requests give mean and deviation. A
    text says why it was not armed. A change that is over, its ``AFTER`` newest requests within ``k`` of what was usual,
    is none: the watch goes on behind it.
    """
    if len(values) < in_control:
        return f"{len(values):,} requests at this version; it takes {in_control:,} to know what is usual"
    names, codes = np.unique(segments, return_inverse=True)
    reference, of = values[:in_control], codes[:in_control]
    counts = np.bincount(of, minlength=len(names))
    known = counts >= SEGMENT
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(of, reference, len(names)) / counts
        spread = np.sqrt(np.maximum(np.bincount(of, reference**2, len(names)) / counts - mean**2, 0.0))
    known &= np.nan_to_num(spread) > 0
    places = in_control + np.nonzero(known[codes[in_control:]])[0]
    standard = (values[places] - mean[codes[places]]) / spread[codes[places]]
    begin = 0
    while alarms := [(alarm, sign) for sign in (-1.0, 1.0) if (alarm := _alarm(sign * standard[begin:], k, h)) >= 0]:
        first, sign = min(alarms)
        alarm = begin + first
        back = _usual_again(standard, alarm, k)
        if back is None:
            # Where a change of the mean began most likely: the suffix whose sum is the most standard errors from 0.
            # What came after the alarm counts too: the alarm itself was an unlucky moment.
            end = min(alarm + 1 + AFTER, len(standard))
            sums = np.cumsum((sign * standard[begin:end])[::-1])
            since = places[end - 1 - int(np.argmax(sums / np.sqrt(np.arange(1, end - begin + 1)))) : end]
            usual = float(mean[codes[since]].mean())
            return Change(int(places[alarm]), int(since[0]), usual, float(values[since].mean()))
        begin = back
    return None


def _alarm(standard: np.ndarray, k: float, h: float) -> int:
    """Where the one-sided CUSUM first crosses ``h``; -1 where it does not."""
    path = np.cumsum(standard - k)
    over = path - np.minimum.accumulate(np.minimum(path, 0.0)) > h
    return int(np.argmax(over)) if over.any() else -1


def _usual_again(standard: np.ndarray, alarm: int, k: float) -> int | None:
    """The end of the first ``AFTER`` requests behind an alarm whose mean is within ``k``; None while there are none."""
    sums = np.cumsum(np.concatenate([[0.0], standard[alarm:]]))
    within = np.abs(sums[AFTER:] - sums[:-AFTER]) <= k * AFTER
    return alarm + AFTER + int(np.argmax(within)) if within.any() else None


def is_dead(drafted: int, accepted: int) -> bool:
    """Drafts are verified and nothing is ever accepted, though the service is healthy.

    Of what was drafted: a policy that drafts rarely, and then well, adds little to a step and is alive.
    """
    return drafted >= DEAD_DRAFTED and accepted < DEAD * drafted


def slide(hours: np.ndarray, values: np.ndarray, weights: np.ndarray) -> Slide | None:
    """A weighted straight line through hourly means; None with too few hours, or where nothing is lost."""
    if len(hours) < SLIDE_HOURS or weights.sum() <= 0:
        return None
    w = weights / weights.sum()
    x, y = hours - (w * hours).sum(), values - (w * values).sum()
    spread = (w * x * x).sum()
    if spread <= 0:
        return None
    slope = (w * x * y).sum() / spread
    residual = (w * (y - slope * x) ** 2).sum() * len(hours) / max(len(hours) - 2, 1)
    error = np.sqrt(residual / (spread * len(hours)))
    lost = -slope * (hours.max() - hours.min())
    t = float(-slope / error) if error > 0 else float("inf")
    begin = float((w * values).sum() + slope * x.min())
    return Slide(float(lost), t, begin) if lost > 0 else None
