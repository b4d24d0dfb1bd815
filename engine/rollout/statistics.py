"""Sequential statistics: valid however often they are looked at, so a guard may look on every tick.

Everything is a pure function of counts and works on numpy arrays of them alike. An e-value is evidence against a null
hypothesis: its expectation under the null is at most 1 at any stopping time, so by Ville's inequality it ever reaches
1/α with probability at most α. Natural logarithms of e-values are used throughout.

Sources: asymptotic confidence sequences, Waudby-Smith et al., arXiv 2103.06476 (theorem 2.2, and its one-sided form);
normal and beta-binomial mixtures, Howard et al., arXiv 1810.08240.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import special

Number = Any  # float, or a numpy array of floats: every function broadcasts
MIN_PAIRS = 10
"""Below this many units per arm a variance is too unsure for any statement: every e-value is 1."""


@dataclass(frozen=True)
class Moments:
    """Sums of x and y over n units; the quantity of interest is the ratio of sums Σx / Σy.

    A unit is what was randomised, an assignment key with all of its requests: units are independent, the requests of
    one are not, and taken for independent they make the variance too small by up to their number. For tokens per verify
    step x_k = those of key k and y_k = 1, so that the ratio is the mean over keys and its variance that of a mean. With
    steps as y_k one key that took most of them would decide the mean and hide its own variance: the residual of what
    dominates a weighted mean is near 0, and no degree of freedom of t makes up for it.
    """

    n: Number = 0
    x: Number = 0
    y: Number = 0
    xx: Number = 0
    yy: Number = 0
    xy: Number = 0

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.n + other.n,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.yy + other.yy,
            self.xy + other.xy,
        )

    @cached_property
    def ratio(self) -> Number:
        return _quotient(self.x, self.y)

    @cached_property
    def variance(self) -> Number:
        """Delta method: Var(Σx/Σy) ≈ n/(n−1) · Σ(x_i − r·y_i)² / (Σy)²."""
        r = self.ratio
        residual = np.maximum(self.xx - 2 * r * self.xy + r * r * self.yy, 0.0)
        return _quotient(_quotient(self.n * residual, np.maximum(self.n - 1, 1)), np.square(self.y))


@dataclass(frozen=True, slots=True)
class Difference:
    """canary − control of two ratios: estimate, standard error, and the number of pairs of units it stands on."""

    estimate: Number
    se: Number
    pairs: Number

    def z(self, at: Number = 0.0) -> Number:
        """Distance of the estimate from ``at`` in standard errors, brought from Student's t to the normal scale.

        The t tails (Welch, at least pairs − 1 degrees of freedom) keep a small sample honest about its own variance.
        """
        t = _quotient(self.estimate - at, self.se)
        freedom = np.maximum(np.asarray(self.pairs, float) - 1.0, 1.0)
        tail = np.maximum(special.stdtr(freedom, -np.abs(t)), 1e-300)
        return -np.sign(t) * special.ndtri(tail)


def difference(canary: Moments, control: Moments, share: float = 1.0) -> Difference:
    """Canary − ``share`` · control, of two arms that serve at the same time.

    ``pairs`` is the harmonic mean of the arms' counts of units.
    """
    pairs = _quotient(2.0 * canary.n * control.n, canary.n + control.n)
    se = np.sqrt(canary.variance + share * share * control.variance)
    return Difference(canary.ratio - share * control.ratio, se, pairs)


def tuned_rho(horizon: float, alpha: float) -> float:
    """ρ that makes the boundary tightest near ``horizon`` pairs: √((a + log(a + 1)) / horizon), a = −2 log 2α."""
    a = -2.0 * np.log(2.0 * alpha)
    return float(np.sqrt((a + np.log(a + 1.0)) / horizon))


def log_e_below(diff: Difference, at: Number, rho: float) -> Number:
    """Evidence against "the true difference is ≥ ``at``": half-normal mixture over drifts below ``at``."""
    log_e = log_e_of_distance(-diff.z(at), diff.pairs, rho)
    return np.where(np.asarray(diff.se) > 0, log_e, 0.0)


def log_e_of_distance(z: Number, pairs: Number, rho: float) -> Number:
    """Evidence of a distance of z standard errors to the wrong side, on t pairs:

    E = 2/√(tρ²+1) · exp(z²·tρ²/(2(tρ²+1))) · Φ(z·√(tρ²/(tρ²+1))).
    """
    share = pairs * rho * rho
    shrink = share / (share + 1.0)
    log_e = np.log(2.0) - 0.5 * np.log1p(share) + 0.5 * z * z * shrink + special.log_ndtr(z * np.sqrt(shrink))
    return np.where(np.asarray(pairs) >= MIN_PAIRS, log_e, 0.0)


def half_width(diff: Difference, rho: float, alpha: float) -> Number:
    """Distance from the estimate to a one-sided 1−α confidence sequence (arXiv 2103.06476):

    σ·√(2(tρ²+1)/(t²ρ²) · log(1 + √(tρ²+1)/(2α))), with σ²/t = the squared standard error. Infinite without data.
    """
    share = diff.pairs * rho * rho
    z = np.sqrt(2.0 * (1.0 + _quotient(1.0, share)) * np.log1p(np.sqrt(share + 1.0) / (2.0 * alpha)))
    freedom = np.maximum(np.asarray(diff.pairs, float) - 1.0, 1.0)
    t = -special.stdtrit(freedom, np.maximum(special.ndtr(-z), 1e-300))
    known = (np.asarray(diff.pairs) >= MIN_PAIRS) & (np.asarray(diff.se) > 0)
    return np.where(known, t * diff.se, np.inf)


def log_e_binomial(canary: Number, control: Number) -> Number:
    """Evidence that events fall on the canary more often than on a control of equal size.

    Given an event it is the canary's with probability p ≤ 1/2 under the null. Mixture of p over (1/2, 1), uniform:
    E = 2^{k+1} · B(c+1, k−c+1) · (1 − I_{1/2}(c+1, k−c+1)) for c of k events, the same in whatever order they came.
    """
    a, b = np.asarray(canary, float) + 1.0, np.asarray(control, float) + 1.0
    return (a + b - 1.0) * np.log(2.0) + log_upper_beta(a, b, 0.5)


def log_e_mismatch(canary: Number, control: Number) -> Number:
    """Evidence that the split is not 1:1 in either direction: beta-binomial mixture, p uniform over (0, 1)."""
    a, b = np.asarray(canary, float) + 1.0, np.asarray(control, float) + 1.0
    return (a + b - 2.0) * np.log(2.0) + special.betaln(a, b)


def log_upper_beta(a: Number, b: Number, x: float) -> Number:
    """log of ∫ s^{a−1}(1−s)^{b−1} ds over (x, 1).

    Where the share above x is too small for a float (a canary much better than its control), the integrand, which is
    log-concave, is bounded by the exponential that touches it at x. Cutting it off instead would make evidence of it.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    share = special.betaincc(a, b, x)
    tiny = share < 1e-280
    if not tiny.any():
        return special.betaln(a, b) + np.log(share)
    fall = np.where(tiny, (b - 1.0) / (1.0 - x) - (a - 1.0) / x, 1.0)
    touching = (a - 1.0) * np.log(x) + (b - 1.0) * np.log1p(-x) - np.log(fall)
    return np.where(tiny, touching, special.betaln(a, b) + np.log(np.where(tiny, 1.0, share)))[()]


def log_mean(blend: float, classes: Sequence[float] | np.ndarray) -> float:
    """log of a mean of e-values: half its weight on the blend of all classes, the other half shared by the classes.

    A mean of e-values is an e-value whatever their dependence. A class that appears later enters with E = 1, which
    draws the mean towards 1 and never over a limit.
    """
    if not len(classes):
        return float(blend)
    return float(np.logaddexp(blend, np.logaddexp.reduce(classes) - np.log(len(classes))) - np.log(2.0))


def _quotient(a: Number, b: Number) -> Number:
    """a / b, and 0 where b is 0."""
    b = np.asarray(b, float)
    none = b == 0
    return np.where(none, 0.0, a / (b + none))[()]
