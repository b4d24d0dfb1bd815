"""The simulation sums traffic as the evidence query would, and its rollouts end as they should."""

from __future__ import annotations

import numpy as np
import pytest

from engine.bench import rollouts
from engine.bench.rollout_world import CLASSES, Regression, Traffic, World, looks
from engine.contracts import CANARY
from engine.store import histogram

AT = looks(200)


@pytest.mark.parametrize("traffic", [Traffic(), Traffic(shock=3.0, day=0.5, mix=True, slow_replica=0.2)])
def test_the_sums_are_those_of_the_requests(traffic: Traffic) -> None:
    canary, _ = World("x", Regression(errors=0.1), traffic).arms(0, AT)
    look = len(AT) // 2
    n = int(AT[look])
    whole, *each = canary.segments(look, None)
    steps, accepted = canary.steps[:n].astype(float), canary.accepted[:n]
    per_step = (steps + accepted) / steps
    assert (whole.n, whole.y, whole.yy) == (n, n, n)
    assert (whole.x, whole.xy, whole.xx) == pytest.approx((per_step.sum(), per_step.sum(), (per_step**2).sum()))
    assert whole.error_keys == canary.failed[:n].sum()
    fine = ~(canary.failed | canary.late)[:n]
    indices, counts = histogram.count(canary.latency[:n][fine])
    assert [list(part) for part in whole.latencies["e2e"]] == [indices, counts]
    assert [s.traffic_class for s in each] == list(CLASSES)
    assert [s.n for s in each] == np.bincount(canary.of_class[:n], minlength=len(CLASSES)).tolist()


def test_late_records_are_seen_later_and_lost_ones_never() -> None:
    late, _ = World("x", traffic=Traffic(late=30)).arms(0, AT)
    seen = [late.segments(look, None)[0].n for look in range(len(AT))]
    assert all(n <= max(0, at - 30) for n, at in zip(seen, AT.tolist(), strict=True))
    lost, _ = World("x", traffic=Traffic(lost=1.0)).arms(0, AT)
    assert lost.segments(len(AT) - 1, None)[0].n == 0


def test_a_regression_of_one_class_leaves_the_others_alone() -> None:
    wrong = World("x", Regression(acceptance=-0.3, scale=2.0, only="batch", begins=50)).arms(3, AT)[0]
    usual = World("x").arms(3, AT)[0]
    hit = (wrong.of_class == CLASSES.index("batch")) & (np.arange(len(wrong.steps)) >= 50)
    assert (wrong.latency[~hit] == usual.latency[~hit]).all()
    assert (wrong.latency[hit] > usual.latency[hit]).all()
    assert wrong.name == CANARY


def test_an_equal_canary_is_not_blamed_where_naive_rules_blame_it() -> None:
    ends = [rollouts.rollout(rollouts.EQUAL[0], 600, "", seed) for seed in range(25)]
    assert [r.ended for r in ends].count("rolled_back") <= 1
    assert sum(r.peek is not None for r in ends) >= 3


@pytest.mark.parametrize(("world", "within"), [(rollouts.WORSE[0], 130), (rollouts.WORSE[3], 520)])
def test_a_worse_canary_is_rolled_back(world: World, within: int) -> None:
    ends = [rollouts.rollout(world, 1_500, "", seed) for seed in range(8)]
    assert {r.ended for r in ends} == {"rolled_back"}
    assert np.median([r.at for r in ends]) <= within


def test_no_traffic_is_nobodys_fault() -> None:
    assert rollouts.no_traffic() == ("INCONCLUSIVE", False)


def test_what_keys_share_is_summed_as_the_evidence_query_would() -> None:
    arm, _ = World("x", Regression(errors=0.1), Traffic(per_key=20)).arms(0, AT)
    n = int(AT[-1])
    whole = arm.segments(len(AT) - 1, None)[0]
    x, y, m = (np.bincount(arm.key[:n], value[:n]) for value in (arm.steps + arm.accepted, arm.steps, np.ones(n)))
    fine = ~(arm.failed | arm.late)[:n]
    assert (whole.requests, whole.keys) == (n, int((m > 0).sum()))
    per_step = x[m > 0] / y[m > 0]
    assert (whole.x, whole.xx) == pytest.approx((per_step.sum(), (per_step**2).sum()))
    assert whole.error_keys == len(set(arm.key[:n][arm.failed[:n]]))
    assert sum(whole.latencies["e2e"][1]) == pytest.approx(len(set(arm.key[:n][fine])))


@pytest.mark.parametrize("by_request", [False, True])
def test_twenty_requests_of_a_key_are_one_observation(by_request: bool) -> None:
    """Identical arms; the planted fault counts latencies as if every request had been drawn by itself."""
    world = rollouts.BY_REQUEST if by_request else rollouts.CONVERSATIONS
    ends = [rollouts.rollout(world, 4_000, "", seed) for seed in range(20)]
    fired = [r.guard for r in ends if r.ended == "rolled_back"]
    assert len(fired) >= 6 if by_request else not fired
    assert all(guard.startswith("e2e_") for guard in fired)


@pytest.mark.parametrize("by_steps", [False, True])
def test_a_key_with_most_of_the_steps_is_one_observation(by_steps: bool) -> None:
    """Identical arms; the planted fault weighs keys by their steps."""
    world = rollouts.BY_STEPS if by_steps else next(w for w in rollouts.EQUAL if w.name == "one_big_key")
    ends = [rollouts.rollout(world, 100, "", seed) for seed in range(20)]
    fired = [r.guard for r in ends if r.ended == "rolled_back"]
    assert len(fired) >= 5 if by_steps else not fired


def test_other_presets_are_simulated_with_all_they_look_at() -> None:
    """The shadow of ``cautious`` included; equal arms are not blamed, and worse ones are, if need be in shadow."""
    for preset in rollouts.OTHER_PRESETS:
        assert rollouts.rollout(World("identical"), 300, "", 0, preset).ended != "rolled_back"
    shadowed = rollouts.rollout(World("x", Regression(acceptance=-0.3)), 300, "", 0, "cautious")
    assert (shadowed.ended, shadowed.guard, shadowed.at) == ("rolled_back", "tokens_per_step", 10)
    costly = rollouts.rollout(World("x", Regression(scale=8.0)), 300, "", 0, "fast")
    assert costly.guard in ("tpot_p50", "fuse_cost", "fuse_p95")


def test_a_rare_long_class_blows_no_fuse() -> None:
    """Quantiles taken at their word did in four of five rollouts."""
    world = next(w for w in rollouts.EQUAL if w.name == "rare_long_class")
    assert {rollouts.rollout(world, 600, "", seed).ended for seed in range(6)} == {"undecided"}
