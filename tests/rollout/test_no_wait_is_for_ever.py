"""Whatever a rollout waits for, it stops waiting: traffic nobody can measure, replicas that do not follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from engine.contracts import RolloutState, Verdict
from engine.rollout import decide as decide_module
from engine.rollout import specs
from engine.rollout.controller import Controller
from engine.rollout.records import Action, RolloutStatus, status_from_json, status_to_json
from engine.rollout.replay import replay
from engine.store.database import Database
from engine.store.repositories import evidence, plans, rollouts
from tests.rollout import database_world
from tests.rollout.test_decide import promoted
from tests.rollout.world import CHAMPION, World, ramping

NONE, TRIED = 1, 3


def held(world: World) -> None:
    world.ask("hold")
    world.tick()


def watched(world: World) -> None:
    promoted(world)
    for _ in range(2):
        world.tick()
    assert world.status.state is RolloutState.WATCHING


@pytest.mark.parametrize("reach", [lambda world: None, held, watched], ids=["ramping", "held", "watching"])
def test_a_canary_that_nobody_can_measure_goes_back_and_is_not_blamed(reach: Callable[[World], None]) -> None:
    world = ramping(replace(specs.preset("fast"), watch_s=10_000.0))
    reach(world)
    world.fault = "the traffic could not be measured: canceling statement"
    began = world.now
    goes_back(world, began, world.spec.blind_s)


@pytest.mark.parametrize("silent", [True, False], ids=["neither arm is seen", "its control is seen"])
@pytest.mark.parametrize("reach", [lambda world: None, held, watched], ids=["ramping", "held", "watching"])
def test_a_canary_that_serves_and_is_not_seen_any_more_goes_back(reach: Callable[[World], None], silent: bool) -> None:
    """Its traces do not come: lost on their way, or of requests that never end."""
    world = ramping(replace(specs.preset("fast"), watch_s=10_000.0))
    reach(world)
    world.both(10, canary=2.3)
    world.tick(0)
    goes_back(world, world.now, world.spec.stale_s + world.spec.blind_s, each=lambda: unseen(world, silent))


def unseen(world: World, silent: bool) -> None:
    world.given()
    world.newest_trace = world.newest_trace if silent else world.now


def goes_back(world: World, began: datetime, after_s: float, each: Callable[[], None] = lambda: None) -> None:
    while world.status.state not in (RolloutState.ROLLING_BACK, RolloutState.INCONCLUSIVE):
        each()
        decision = world.tick(5)
        assert decision.verdict is not Verdict.FAIL
        assert decision.action in (Action.NONE, Action.ROLL_BACK)
        assert world.now - began <= timedelta(seconds=after_s + 15)
    assert world.now - began > timedelta(seconds=after_s)
    assert "unguarded for more than 60 s" in world.status.reason
    assert world.ledger.champion == CHAMPION
    assert world.tick().to_state is RolloutState.INCONCLUSIVE


def test_a_canary_that_is_given_nothing_is_waited_for_until_its_deadline() -> None:
    """No traffic is no blindness, not even after a request whose trace has come."""
    world = ramping()
    world.given()
    world.tick(5)
    world.both(3, canary=2.3)
    began = world.status.stages[0].began
    while world.status.state is not RolloutState.ROLLING_BACK:
        world.tick(20)
        assert world.status.blind_since is None
    assert world.now - began > timedelta(seconds=world.spec.deadline_s)
    assert "no verdict within 900 s" in world.status.reason
    assert world.status.ends_as is RolloutState.INCONCLUSIVE


def test_a_request_that_comes_after_a_long_silence_is_waited_for() -> None:
    world = ramping()
    world.both(5)
    for _ in range(6):
        world.tick(world.spec.stale_s + 1)
        world.given()
        assert world.tick(world.spec.blind_s / 2).status.blind_since is not None
        world.both(6)
        assert world.tick(1).status.blind_since is None
    assert world.status.state is RolloutState.RAMPING


def test_one_look_that_succeeds_begins_the_patience_anew() -> None:
    world = ramping()
    for _ in range(10):
        world.fault = "slow"
        world.tick(30)
        world.fault = None
        world.both(30)
        assert world.tick(1).action is not Action.ROLL_BACK
    assert status_from_json(status_to_json(world.status)) == world.status


def test_forgetting_since_when_nobody_could_measure_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault of the tests above: patience that begins anew on every tick."""

    def forgetful(status: RolloutStatus, _: object, now: datetime) -> RolloutStatus:
        return replace(status, blind_since=now)

    monkeypatch.setattr(decide_module, "_noting_blindness", forgetful)
    with pytest.raises(AssertionError):
        test_a_canary_that_nobody_can_measure_goes_back_and_is_not_blamed(lambda world: None)


def test_taking_lost_traces_for_no_traffic_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: only what cannot be measured counts as blindness, and what is not seen is waited for."""
    monkeypatch.setattr(decide_module, "blindness", lambda spec, status, evidence, now: evidence.fault)
    for silent in (True, False):
        with pytest.raises(AssertionError):
            test_a_canary_that_serves_and_is_not_seen_any_more_goes_back(lambda world: None, silent)


def test_a_new_champion_is_not_called_safe_while_nobody_can_measure_it() -> None:
    world = ramping(replace(specs.preset("fast"), watch_s=30.0))
    watched(world)
    world.fault = "the traffic could not be measured: canceling statement"
    assert world.tick(40).to_state is RolloutState.WATCHING
    world.fault = None
    assert world.tick(1).to_state is RolloutState.DONE


@pytest.mark.parametrize("alive", [True, False])
def test_a_promotion_that_a_replica_does_not_follow_ends_and_names_it(alive: bool) -> None:
    world = ramping()
    promoted(world)
    stuck = replace(world.replicas[0], replica_id="r-stuck", observed_generation=world.ledger.generation - 1)
    world.replicas = (*world.replicas, stuck) if alive else ()
    assert world.tick(world.spec.promote_s - 1).to_state is RolloutState.PROMOTING
    decision = world.tick(1)
    assert (decision.action, decision.status.ends_as) == (Action.ROLL_BACK, RolloutState.INCONCLUSIVE)
    assert ("r-stuck" if alive else "a replica") in decision.reason
    assert (world.ledger.champion, world.ledger.canary) == (CHAMPION, None)
    assert world.tick().to_state is RolloutState.INCONCLUSIVE


def test_a_replica_that_ignores_a_rollback_is_named_and_success_is_not_claimed() -> None:
    world = ramping()
    world.ask("abort")
    world.tick()
    world.replicas = (replace(world.replicas[0], observed_generation=world.ledger.generation - 1),)
    decision = world.tick(world.spec.promote_s + 1)
    assert decision.to_state is RolloutState.ROLLING_BACK
    assert "replica-0 does not follow the ledger: stop it" in decision.reason


@pytest.mark.parametrize("keeps", ["held", "held and released again and again", "no replica"])
def test_a_rollout_that_never_starts_ends_at_its_deadline_and_nobody_is_blamed(keeps: str) -> None:
    """0 requests for as long as it may wait: before, a hold before traffic had no end, and each one began it anew."""
    world = World(replace(specs.preset("fast"), deadline_s=3_600.0))
    world.replicas = () if keeps == "no replica" else world.replicas
    began, verbs = world.now, ("hold", "resume") if "again" in keeps else ("hold",)
    if keeps != "no replica":
        world.ask("hold")
    while world.now - began <= timedelta(seconds=world.spec.deadline_s - 20):
        decision = world.tick(20)
        assert decision.to_state in (RolloutState.READY, RolloutState.HELD)
        assert decision.verdict is Verdict.INSUFFICIENT
        if "again" in keeps:  # a hold is asked for in the tick of the release, so that it never starts
            world.replicas = ()
            world.ask(verbs[len(world.commands) % 2])
    decision = world.tick(40)
    assert (decision.to_state, decision.action) == (RolloutState.INCONCLUSIVE, Action.NONE)
    assert "did not start within 3600 s" in decision.reason
    assert status_from_json(status_to_json(world.status)) == world.status
    assert world.tick(40).to_state is RolloutState.INCONCLUSIVE


@pytest.mark.parametrize("broken", ["counting", "judging"])
def test_whatever_breaks_in_measuring_reaches_the_decision(
    going: tuple[Database, Controller, datetime], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """An error of Python, not of the database: before, the tick failed and the canary served on for ever."""
    db, acting, now = going

    def breaks(*args: object, **kwargs: object) -> None:
        if broken == "counting" or args[1]:
            raise ZeroDivisionError("nobody foresaw this")

    right = decide_module.evaluate
    if broken == "counting":
        monkeypatch.setattr(evidence, "segments", breaks)
    else:
        monkeypatch.setattr(decide_module, "evaluate", lambda *a, **k: breaks(*a) or right(*a, **k))
        monkeypatch.setattr(evidence, "segments", lambda *_: [evidence.Segment("canary", None, 5)])
    for _ in range(30):
        now += timedelta(seconds=5)
        database_world.beat(db, now, (NONE, CHAMPION, TRIED))
        acting.tick(now)
    with db.read() as session:
        found, plan = rollouts.list_rollouts(session)[0], plans.latest(session)
        decisions = rollouts.decisions(session, found.id)
    assert plan is not None
    assert (found.state, plan.champion, plan.arms) == (RolloutState.INCONCLUSIVE, CHAMPION, ())
    assert "ZeroDivisionError" in found.status["reason"]
    assert Verdict.FAIL not in {d.verdict for d in decisions}
    assert replay(found, decisions).agrees


@pytest.mark.parametrize("generation", [1, 2])
def test_what_replicas_say_they_gave_the_canary_is_believed_under_its_own_plan(
    going: tuple[Database, Controller, datetime], generation: int
) -> None:
    """No trace is written. What was given under the plan before left its traces there, and is not looked for here."""
    db, acting, now = going
    for _ in range(30):
        now += timedelta(seconds=5)
        given = {"generation": generation, "at": now.isoformat()}
        database_world.beat(db, now, (NONE, CHAMPION, TRIED), canary_given=given)
        acting.tick(now)
    with db.read() as session:
        found = rollouts.list_rollouts(session)[0]
        decisions = rollouts.decisions(session, found.id)
    unseen = generation == 2
    assert found.state is (RolloutState.INCONCLUSIVE if unseen else RolloutState.HELD)
    assert ("none of its traces has come" in found.status["reason"]) is unseen
    assert replay(found, decisions).agrees


def test_a_measurement_is_bounded_as_a_whole(db: Database) -> None:
    """Each statement alone would be in time."""
    seconds = iter([0.0, 0.0, 0.6, 1.2])
    with db.read() as session, evidence.within(session, 1.0, lambda: next(seconds)):
        session.execute(text("SELECT 1"))
        session.execute(text("SELECT 1"))
        with pytest.raises(evidence.TooSlow, match="longer than 1 s"):
            session.execute(text("SELECT 1"))


def test_a_statement_gets_no_more_time_than_is_left(db: Database) -> None:
    seconds = iter([0.0, 0.95])
    with (
        db.read() as session,
        evidence.within(session, 1.0, lambda: next(seconds)),
        pytest.raises(OperationalError, match="statement timeout"),
    ):
        session.execute(text("SELECT pg_sleep(30)"))
