"""A rollout in shadow: it serves nobody, goes on when enough was seen, and ends like any other."""

from __future__ import annotations

from dataclasses import replace
from math import exp

import pytest

from engine.contracts import CANARY, CONTROL, RolloutState, Verdict
from engine.rollout import specs
from engine.rollout.evaluate import evaluate
from engine.rollout.guards import Shadow, SpecError
from engine.rollout.records import Action, status_from_json, status_to_json, weights
from tests.rollout.world import World, segment

SPEC = replace(specs.preset("fast"), shadow=Shadow(100))


def shadowing() -> World:
    world = World(SPEC)
    decision = world.tick()
    assert (decision.to_state, decision.action) == (RolloutState.SHADOW, Action.SHADOW)
    assert not world.status.serves
    assert weights(world.status, world.evidence())["desired"] == 0
    return world


def drafted(world: World, requests: int, canary: float = 2.0, control: float = 2.0) -> None:
    world.traffic(
        *(segment(arm, requests, value, name) for arm, value in ((CANARY, canary), (CONTROL, control))
          for name in (None, "chat"))
    )  # fmt: skip


def test_it_serves_nobody_until_enough_was_drafted() -> None:
    world = shadowing()
    for requests in (0, 30, 99):
        drafted(world, requests)
        decision = world.tick()
        assert (decision.to_state, decision.action, decision.verdict) == (
            RolloutState.SHADOW, Action.NONE, Verdict.INSUFFICIENT,
        )  # fmt: skip
    assert "99 of 100 requests drafted in shadow, none served, 2.000 tokens per verify step against 2.000" in (
        world.status.reason
    )
    drafted(world, 100)
    decision = world.tick()
    assert (decision.to_state, decision.action, decision.weight) == (
        RolloutState.RAMPING, Action.SET_WEIGHT, SPEC.steps[0],
    )  # fmt: skip
    assert decision.guards[0].guard == "tokens_per_step"
    assert world.status.serves


def test_a_draft_that_earns_less_is_rolled_back_without_having_served() -> None:
    world = shadowing()
    drafted(world, 60, canary=1.0)
    decision = world.tick()
    assert (decision.verdict, decision.action) == (Verdict.FAIL, Action.ROLL_BACK)
    assert decision.reason.startswith("in shadow: tokens_per_step: the canary commits 1.000")
    world.tick()
    assert world.status.state is RolloutState.ROLLED_BACK
    assert not world.status.stages


def test_a_draft_that_fails_is_rolled_back_without_having_served() -> None:
    """Against plain decoding it earns no less, so its errors must speak."""
    world = shadowing()
    drafted(world, 60, canary=1.0, control=1.0)
    failed = [replace(s, error_keys=40, draft_error_keys=40) if s.arm == CANARY else s for s in world.segments]
    assert world.tick().verdict is Verdict.INSUFFICIENT
    world.traffic(*failed)
    decision = world.tick()
    assert (decision.verdict, decision.action) == (Verdict.FAIL, Action.ROLL_BACK)
    assert decision.reason.startswith("in shadow: errors: 40 keys met errors in 60 requests of the canary")
    assert "40 were of its draft" in decision.reason
    assert {guard.guard for guard in decision.guards} == {"tokens_per_step", "errors"}


@pytest.mark.parametrize(("rules", "spent"), [(2, 1.0), (1, 1.2)])
def test_a_shadow_spends_what_is_set_aside_for_it(rules: int, spent: float) -> None:
    """Twice the false rollbacks of two guards out of eight, in rollouts that were frozen before."""
    spec = replace(specs.preset("cautious"), rules=rules)
    limits = {
        stage: [g.limit for g in evaluate(spec, (), **{stage: True}) if g.log_e is not None and g.guard != "srm"]
        for stage in ("in_shadow", "watching")
    } | {"trial": [g.limit for g in evaluate(spec, ()) if g.log_e is not None and g.guard != "srm"]}
    assert [len(of) for of in limits.values()] == [2, 8, 8]
    total = sum(exp(-limit) for of in limits.values() for limit in of if limit is not None)
    assert total == pytest.approx(spent * spec.alpha)


def test_what_people_ask_of_a_shadow() -> None:
    world = shadowing()
    world.ask("promote")
    assert "refused" in world.tick().reason
    world.ask("hold")
    assert world.tick().to_state is RolloutState.HELD
    drafted(world, 500)
    assert world.tick().to_state is RolloutState.HELD
    world.ask("resume")
    assert world.tick().to_state is RolloutState.SHADOW
    drafted(world, 0)
    world.ask("abort")
    assert world.tick().action is Action.ROLL_BACK
    world.tick()
    assert world.status.state is RolloutState.CANCELLED


def test_a_held_shadow_that_turns_bad_is_taken_back() -> None:
    world = shadowing()
    world.ask("hold")
    world.tick()
    drafted(world, 60, canary=1.0)
    assert world.tick().action is Action.ROLL_BACK


def test_without_requests_it_ends_without_blame() -> None:
    world = shadowing()
    world.tick(SPEC.deadline_s - 5)
    assert world.status.state is RolloutState.SHADOW
    world.tick(10)
    world.tick()
    assert world.status.state is RolloutState.INCONCLUSIVE


def test_a_rollback_in_the_ledger_is_believed() -> None:
    world = shadowing()
    world.outsider()
    assert "by bob" in world.tick().reason
    world.tick()
    assert world.status.state is RolloutState.ROLLED_BACK


def test_replicas_that_have_not_loaded_it_are_waited_for() -> None:
    world = shadowing()
    world.replicas = tuple(replace(r, observed_generation=1) for r in world.replicas)
    drafted(world, 500)
    assert "waiting for replica-0 to load" in world.tick().reason


def test_its_status_and_its_specification_come_back_the_same() -> None:
    world = shadowing()
    assert status_from_json(status_to_json(world.status)) == world.status
    assert specs.parse(specs.to_dict(SPEC)) == SPEC
    assert specs.preset("cautious").shadow == Shadow(200)


@pytest.mark.parametrize("shadow", [{"requests": 0}, {"requests": 1.5}, {"request": 3}, 7])
def test_a_wrong_shadow_is_refused(shadow: object) -> None:
    with pytest.raises(SpecError, match="shadow"):
        specs.parse(specs.to_dict(SPEC) | {"shadow": shadow})
