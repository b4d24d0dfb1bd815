"""False alarms and power by seeded simulation that looks after every request; a faulty bound must be caught."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from engine.rollout import statistics
from engine.rollout.statistics import Difference, Moments

ALPHA = 0.005  # one of two guards of a rollout with a budget of 1 %
LIMIT = np.log(1 / ALPHA)
ROLLOUTS, REQUESTS, FIRST_LOOK = 2_000, 500, 12
Bound = Callable[[Difference], np.ndarray]


def arm(rng: np.random.Generator, rollouts: int, requests: int, acceptance: float) -> Moments:
    """Cumulative moments [rollouts, requests] of tokens per step: a request takes 10–59 steps, drafts 2 in each, and
    has its own acceptance."""
    steps = rng.integers(10, 60, (rollouts, requests)).astype(float)
    own = np.clip(rng.beta(4, 6, (rollouts, requests)) + acceptance, 0, 1)
    per_step = 1.0 + rng.binomial((2 * steps).astype(int), own) / steps
    n = np.broadcast_to(np.arange(1, requests + 1.0), steps.shape)
    x, xx = np.cumsum(per_step, 1), np.cumsum(per_step**2, 1)
    return Moments(n, x, n, xx, n, x)


def alarms(bound: Bound, shift: float, rollouts: int, requests: int, seed: int) -> np.ndarray:
    """For each simulated rollout the request pair at which ``bound`` first says "worse"; ``requests`` where never."""
    rng = np.random.default_rng(seed)
    diff = statistics.difference(arm(rng, rollouts, requests, shift), arm(rng, rollouts, requests, 0.0))
    said = bound(diff)
    said[:, :FIRST_LOOK] = False
    return np.where(said.any(1), said.argmax(1) + 1, requests)


def sequential(horizon: int) -> Bound:
    rho = statistics.tuned_rho(horizon, ALPHA)
    return lambda diff: statistics.log_e_below(diff, 0.0, rho) >= LIMIT


def fixed_sample(diff: Difference) -> np.ndarray:
    """The planted fault: a z-test at the same level, looked at as often."""
    return diff.z(0.0) < -2.576


@pytest.mark.parametrize("horizon", [60, 300])
def test_identical_arms_are_rarely_blamed_however_often_one_looks(horizon: int) -> None:
    false = alarms(sequential(horizon), 0.0, ROLLOUTS, REQUESTS, seed=1) < REQUESTS
    assert false.mean() <= 2 * ALPHA


def test_the_simulation_catches_a_bound_that_may_not_be_peeked_at() -> None:
    false = alarms(fixed_sample, 0.0, ROLLOUTS, REQUESTS, seed=1) < REQUESTS
    assert false.mean() > 0.02


@pytest.mark.parametrize("horizon", [60, 300])
def test_a_loss_of_five_points_of_acceptance_is_found(horizon: int) -> None:
    found = alarms(sequential(horizon), -0.05, 200, 1_200, seed=2)
    assert np.median(found) < 400
    assert (found < 1_200).mean() > 0.99


def test_the_confidence_sequence_covers_at_every_look() -> None:
    rng = np.random.default_rng(3)
    diff = statistics.difference(arm(rng, ROLLOUTS, REQUESTS, -0.02), arm(rng, ROLLOUTS, REQUESTS, 0.0))
    truth = -0.02 * 2  # two drafted tokens a step; the beta stays inside [0, 1] almost surely
    width = statistics.half_width(diff, statistics.tuned_rho(300, ALPHA), ALPHA)
    missed = (diff.estimate + width < truth)[:, FIRST_LOOK:].any(1)
    assert missed.mean() <= 2 * ALPHA


def test_bound_and_e_value_agree_on_which_side_zero_lies() -> None:
    """The closed-form bound is never tighter than the mixture it comes from."""
    rng, rho = np.random.default_rng(4), statistics.tuned_rho(200, ALPHA)
    diff = statistics.difference(arm(rng, 300, 600, -0.06), arm(rng, 300, 600, 0.0))
    by_bound = diff.estimate + statistics.half_width(diff, rho, ALPHA) < 0
    by_e = statistics.log_e_below(diff, 0.0, rho) >= LIMIT
    assert not (by_bound & ~by_e).any()
    assert (by_e & ~by_bound).mean() < 0.05


def test_the_ratio_and_its_variance_are_those_of_the_delta_method() -> None:
    rng = np.random.default_rng(5)
    y = rng.integers(5, 50, (20_000, 60)).astype(float)
    x = y * rng.normal(2.0, 0.4, y.shape)
    moments = Moments(60, x.sum(1), y.sum(1), (x * x).sum(1), (y * y).sum(1), (x * y).sum(1))
    assert moments.variance.mean() == pytest.approx(moments.ratio.var(), rel=0.05)


def test_moments_add_up() -> None:
    a, b = Moments(1, 2.0, 1.0, 4.0, 1.0, 2.0), Moments(2, 5.0, 3.0, 13.0, 5.0, 8.0)
    assert (a + b).ratio == 7 / 4


def test_errors_at_equal_rates_are_rarely_blamed() -> None:
    rng = np.random.default_rng(6)
    canary = np.cumsum(rng.random((4_000, 500)) < 0.5, 1)  # events in order; each is the canary's with probability ½
    control = np.arange(1, 501) - canary
    assert (statistics.log_e_binomial(canary, control) >= LIMIT).any(1).mean() <= ALPHA * 1.5


def test_errors_from_half_a_percent_to_five_are_found() -> None:
    rng = np.random.default_rng(7)
    canary, control = (np.cumsum(rng.random((500, 2_000)) < rate, 1) for rate in (0.05, 0.005))
    said = statistics.log_e_binomial(canary, control) >= LIMIT
    assert np.median(said.argmax(1)) < 350
    assert said.any(1).all()


def test_a_better_canary_is_never_blamed_for_errors() -> None:
    assert statistics.log_e_binomial(0, 40) < 0
    assert statistics.log_e_binomial(0, 0) == pytest.approx(0.0)
    for many in (800, 2_000, 50_000):  # 2^-many is no float any more
        assert statistics.log_e_binomial(0, many) == pytest.approx(-np.log(many + 1.0), abs=0.01)
        assert statistics.log_e_binomial(many // 10, many) < 0


def test_e_values_of_events_have_expectation_one_under_the_null() -> None:
    """Exactly, by enumeration of the binomial law."""
    from scipy.stats import binom

    k = np.arange(31)
    weight = binom.pmf(k, 30, 0.5)
    assert weight @ np.exp(statistics.log_e_mismatch(k, 30 - k)) == pytest.approx(1.0)
    assert weight @ np.exp(statistics.log_e_binomial(k, 30 - k)) == pytest.approx(1.0)


def test_a_broken_split_is_seen_in_both_directions() -> None:
    assert statistics.log_e_mismatch(40, 90) > np.log(1000)
    assert statistics.log_e_mismatch(90, 40) > np.log(1000)
    assert statistics.log_e_mismatch(60, 70) < 0


def test_without_data_there_is_no_evidence() -> None:
    none = statistics.difference(Moments(), Moments())
    assert statistics.log_e_below(none, 0.0, 0.1) == 0
    assert statistics.half_width(none, 0.1, 0.05) == np.inf
    assert statistics.log_mean(0.7, []) == 0.7


def test_the_mean_gives_half_its_weight_to_the_blend() -> None:
    assert statistics.log_mean(np.log(3.0), np.log([1.0, 5.0, 9.0])) == pytest.approx(np.log(0.5 * 3 + 0.5 * 5))
