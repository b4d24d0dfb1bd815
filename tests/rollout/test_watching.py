"""After a promotion the champion before stays as a control, and what came before the promotion protects nobody."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from engine.bench.rollout_simulation import Simulation
from engine.bench.rollout_world import Regression, World, looks
from engine.contracts import CANARY, CONTROL, Arm, RolloutState, Verdict
from engine.rollout import specs
from engine.rollout.controller import Controller
from engine.rollout.guards import SpecError
from engine.rollout.launch import launch
from engine.rollout.loading import gather, load
from engine.rollout.records import Action, weights
from engine.store.database import Database
from engine.store.repositories import plans, rollouts
from tests.rollout import database_world
from tests.rollout import world as world_module
from tests.rollout.test_decide import promoted, to_soaking
from tests.rollout.world import CANARY_VERSION, CHAMPION, ramping

NONE, TRIED = 1, 3


def test_a_regression_after_the_promotion_takes_the_new_champion_back() -> None:
    world = ramping(replace(specs.preset("fast"), watch_s=900.0))
    promoted(world)
    assert (world.ledger.champion, world.status.watch is not None) == (CANARY_VERSION, True)
    world.both(10)
    assert [world.tick(1).to_state for _ in range(2)] == [RolloutState.PROMOTED, RolloutState.WATCHING]
    world.both(80, canary=1.05)
    decision = world.tick(60)
    assert (decision.verdict, decision.action) == (Verdict.FAIL, Action.ROLL_BACK)
    assert world.ledger.champion == CHAMPION
    assert world.tick().to_state is RolloutState.ROLLED_BACK


@pytest.mark.parametrize(
    ("rules", "more", "ends_after", "says"),
    [
        (3, 0, 900, ", unwatched"),
        (3, 24, 900, ", hardly watched: 24 of 25"),
        (3, 25, 10, "and stays"),
        (2, 0, 10, ", unwatched"),
    ],
)
def test_a_watch_lasts_until_its_guards_had_something_to_judge(
    rules: int, more: int, ends_after: int, says: str
) -> None:
    """On a slow machine no request begins and ends within ten seconds. What was frozen before keeps its seconds."""
    world = ramping(replace(specs.preset("fast"), rules=rules))
    promoted(world)
    world.segments = ()
    assert [world.tick(1).to_state for _ in range(2)] == [RolloutState.PROMOTED, RolloutState.WATCHING]
    world.both(more, canary=2.3)
    began = world.now
    while (decision := world.tick(5)).to_state is RolloutState.WATCHING:
        assert rules == 2 or f"and 25 requests per arm, {more} so far" in decision.reason
    assert (decision.to_state, decision.action) == (RolloutState.DONE, Action.SETTLE)
    assert world.now - began == timedelta(seconds=ends_after)
    assert says in decision.reason
    assert ("watched" in decision.reason) is (more < 25)


@pytest.mark.parametrize("holdback", [0.0, 0.2])
def test_the_control_ends_with_the_watch(holdback: float) -> None:
    world = ramping(replace(specs.preset("fast"), holdback=holdback))
    to_soaking(world)
    world.both(400, canary=2.3)
    decision = world.tick(world.spec.soak_s)
    assert (decision.action, decision.weight) == (Action.PROMOTE, holdback)
    for _ in range(2):
        world.tick()
    decision = world.tick(world.spec.watch_s)
    assert decision.to_state is RolloutState.DONE
    assert decision.action is (Action.SETTLE if holdback else Action.NONE)
    assert world.ledger.champion == CANARY_VERSION


def test_both_comparisons_together_spend_no_more_than_was_allowed() -> None:
    spec = specs.preset("standard")
    guards = sum(guard.statistical for guard in spec.guards)
    assert guards * (spec.guard_alpha() + spec.guard_alpha(watching=True)) == pytest.approx(spec.alpha)
    with pytest.raises(SpecError, match=r"holdback is at most 0.5"):
        specs.validate(replace(spec, holdback=0.7))
    with pytest.raises(SpecError, match=r"watch_share lies between 0 and 1"):
        specs.validate(replace(spec, watch_share=1.0))


def test_how_evidence_is_shared_out_is_frozen_and_old_rollouts_keep_theirs() -> None:
    """A replay must not depend on a constant of today's code."""
    spec = replace(specs.preset("fast"), watch_share=0.5)
    tree = specs.to_dict(spec)
    assert specs.parse(tree).guard_alpha() == spec.guard_alpha() == spec.guard_alpha(watching=True)
    assert specs.spec_hash(spec) != specs.spec_hash(specs.preset("fast"))
    old = {name: value for name, value in tree.items() if name != "watch_share"}
    assert specs.thaw(old).guard_alpha(watching=True) == pytest.approx(0.2 * spec.alpha / 4)


def test_the_three_weights_follow_the_traffic_to_its_end() -> None:
    """A trial, its promotion beside a control, all of it; and all of it back."""

    def told(world: world_module.World) -> tuple[float | None, float | None]:
        found = weights(world.status, world.evidence())
        return found["desired"], found["acknowledged"]

    world = ramping()
    assert told(world) == (0.3, 0.3)
    promoted(world)
    assert told(world) == (0.75, 0.75)
    for seconds in (1, 1, world.spec.watch_s):
        world.tick(seconds)
    assert world.status.state is RolloutState.DONE
    assert told(world) == (1.0, 1.0)
    world = ramping()
    world.ask("abort")
    world.tick()
    late = replace(world.replicas[0], observed_generation=world.ledger.generation - 1)
    world.replicas = (*world.replicas, replace(late, replica_id="late"))
    assert told(world) == (0.0, 0.3)
    world.observe()
    assert told(world) == (0.0, 0.0)


def test_the_ledger_keeps_the_control_and_only_what_came_after_is_counted(db: Database) -> None:
    now, rng = datetime.now(UTC), np.random.default_rng(0)
    database_world.versions(db, 3)
    database_world.first_plan(db, CHAMPION, NONE)
    database_world.beat(db, now, (NONE, CHAMPION))
    made = launch(db, canary=TRIED, actor="ann", spec=replace(specs.preset("fast"), watch_s=600.0), now=now)
    acting, state = Controller(db, "a", 15.0), RolloutState.READY
    for _ in range(40):
        now += timedelta(seconds=5)
        database_world.beat(db, now, (NONE, CHAMPION, TRIED))
        database_world.serve(db, rng, now, 40, {NONE: 0.0, CHAMPION: 1.0, TRIED: 1.6})
        decision = acting.tick(now)
        assert decision is not None
        state = decision.to_state
        if state is RolloutState.WATCHING:
            break
    assert state is RolloutState.WATCHING
    with db.read() as session:
        plan = plans.latest(session)
        rollout = rollouts.get(session, made.id)
        assert plan is not None
        assert rollout is not None
        evidence, _ = gather(session, *load(rollout), now)
    assert (plan.champion, plan.canary, plan.rollback_target) == (TRIED, None, CHAMPION)
    assert plan.arms == (Arm(CANARY, TRIED, 0.25), Arm(CONTROL, CHAMPION, 0.25))
    assert sum(s.requests for s in evidence.segments if s.traffic_class is None) < 80
    for _ in range(20):
        now += timedelta(seconds=5)
        database_world.beat(db, now, (NONE, CHAMPION, TRIED))
        database_world.serve(db, rng, now, 40, {NONE: 0.0, CHAMPION: 1.0, TRIED: 0.3})
        acting.tick(now)
    with db.read() as session:
        plan, rollout = plans.latest(session), rollouts.get(session, made.id)
    assert plan is not None
    assert rollout is not None
    assert (plan.champion, plan.arms, rollout.state) == (CHAMPION, (), RolloutState.ROLLED_BACK)


@pytest.mark.parametrize("lives_on_its_past", [False, True])
def test_a_good_past_hides_no_regression(monkeypatch: pytest.MonkeyPatch, lives_on_its_past: bool) -> None:
    """The planted fault counts what came before the promotion as well."""
    better = World("x", Regression(acceptance=-0.10), before=0.05)
    at = looks(6_000, 20)
    reached = Simulation(replace(better, wrong=Regression(acceptance=0.05)), 1, at).reaches("watching")
    assert reached is not None
    begins = int(at[reached])
    going = Simulation(better, 1, at, begins)
    if lives_on_its_past:
        monkeypatch.setattr(
            Simulation, "seen", lambda self, look: [s for arm in self.arms for s in arm.segments(look, self.stage_look)]
        )
    assert going.end()[0] == ("promoted" if lives_on_its_past else "rolled_back")
