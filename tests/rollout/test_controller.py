"""The controller against a real Postgres: one writer, all or nothing, and a record that replays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from sqlalchemy import text

from engine.contracts import CANARY, RolloutState, SlipstreamError, Verdict
from engine.rollout import specs
from engine.rollout.controller import Controller, launch_awaiting
from engine.rollout.decide import decide
from engine.rollout.launch import launch, release
from engine.rollout.loading import Untrusted, gather, load
from engine.rollout.records import Action
from engine.rollout.replay import replay
from engine.store.database import Database, WriteSession
from engine.store.models import RolloutCommandRow, RolloutRow
from engine.store.repositories import commands, learning, plans, rollouts
from engine.store.repositories.learning import Attempt
from engine.store.repositories.leases import LeaseLost
from engine.store.repositories.plans import StalePlan
from engine.store.repositories.rollouts import Rollout
from tests.rollout import database_world as world

NONE, CHAMPION, TRIED = 1, 2, 3


@pytest.fixture
def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def ready(db: Database, now: datetime) -> Database:
    """Three versions, v2 champion, one replica that holds what a rollback needs, and a rollout of v3."""
    assert world.versions(db, 3) == [NONE, CHAMPION, TRIED]
    world.first_plan(db, CHAMPION, NONE)
    world.beat(db, now, (NONE, CHAMPION))
    launch(db, canary=TRIED, actor="ann", preset="fast", now=now)
    return db


def controller(db: Database, name: str = "a") -> Controller:
    return Controller(db, name, lease_s=15.0)


def current(db: Database) -> rollouts.Rollout:
    with db.read() as session:
        return rollouts.list_rollouts(session)[0]


def run(
    db: Database, now: datetime, tried: float, until: Callable[[RolloutState], bool], rate: float = 0.0, limit: int = 80
) -> datetime:
    """Traffic and ticks, five seconds apart, until the rollout's state fits."""
    rng, acting = np.random.default_rng(0), controller(db)
    for _ in range(limit):
        now += timedelta(seconds=5)
        world.beat(db, now, (NONE, CHAMPION, TRIED))
        world.serve(db, rng, now, 40, {NONE: 0.0, CHAMPION: 1.0, TRIED: tried}, {TRIED: rate})
        acting.tick(now)
        if until(current(db).state):
            return now
    raise AssertionError(f"still {current(db).state} after {limit} ticks: {current(db).status['reason']}")


def test_a_better_version_becomes_champion_and_the_record_replays(ready: Database, now: datetime) -> None:
    run(ready, now, 1.6, lambda state: state is RolloutState.DONE)
    with ready.read() as session:
        plan = plans.latest(session)
        decisions = rollouts.decisions(session, current(ready).id)
    assert plan is not None
    assert (plan.champion, plan.arms, plan.rollback_to) == (TRIED, (), CHAMPION)
    assert [d.action for d in decisions if d.action != "none"] == ["set_weight", "set_weight", "promote", "settle"]
    assert replay(current(ready), decisions).agrees
    assert decisions[2].evidence["guards"][0]["guard"] == "tokens_per_step"
    assert set(decisions[2].evidence["weights"]) == {"desired", "acknowledged", "observed"}


def test_replay_notices_a_record_that_was_changed(ready: Database, now: datetime) -> None:
    run(ready, now, 0.1, lambda state: state is RolloutState.ROLLED_BACK)
    with ready.read() as session:
        decisions = rollouts.decisions(session, current(ready).id)
    failed = next(i for i, d in enumerate(decisions) if d.verdict is Verdict.FAIL)
    decisions[failed] = replace(decisions[failed], verdict=Verdict.PASS)
    assert [d.stored[0] for d in replay(current(ready), decisions).differing] == ["PASS"]


def test_replay_checks_weights_and_hash_and_counts_what_it_cannot_read(ready: Database, now: datetime) -> None:
    run(ready, now, 0.1, lambda state: state is RolloutState.ROLLED_BACK)
    with ready.read() as session:
        decisions = rollouts.decisions(session, current(ready).id)
    served = next(i for i, d in enumerate(decisions) if d.status_before.get("stages"))
    was = decisions[served]
    heavier = [stage | {"weight": 0.5} for stage in was.status_before["stages"]]
    decisions[served] = replace(was, status_before=was.status_before | {"stages": heavier})
    assert [d.decision_id for d in replay(current(ready), decisions).differing][:1] == [was.id]
    strange = [segment | {"colour": "red"} for segment in was.evidence["inputs"]["segments"] or [{}]]
    inputs = was.evidence["inputs"] | {"segments": strange}
    decisions[served] = replace(was, evidence=was.evidence | {"inputs": inputs})
    made = replay(current(ready), decisions)
    assert (made.differing, made.unreadable, made.agrees) == ((), (was.id,), False)
    with pytest.raises(Untrusted, match="not those it was started with"):
        replay(replace(current(ready), spec_hash="0" * 64), decisions)


@pytest.mark.parametrize(("tried", "rate"), [(0.1, 0.0), (1.0, 0.6)])
def test_a_worse_version_is_rolled_back(ready: Database, now: datetime, tried: float, rate: float) -> None:
    run(ready, now, tried, lambda state: state is RolloutState.ROLLED_BACK, rate)
    with ready.read() as session:
        plan = plans.latest(session)
    assert plan is not None
    assert (plan.champion, plan.arms) == (CHAMPION, ())


def test_of_two_controllers_one_acts(ready: Database, now: datetime) -> None:
    first, second = controller(ready, "a"), controller(ready, "b")
    assert first.tick(now) is not None
    assert second.tick(now) is None
    later = now + timedelta(seconds=16)
    world.beat(ready, later, (NONE, CHAMPION))
    assert second.tick(later) is not None
    with ready.read() as session:
        tokens = [d.fencing_token for d in rollouts.decisions(session, current(ready).id)]
    assert tokens == [0, 1, 2]  # the start is nobody's turn


def test_a_controller_that_slept_through_its_lease_writes_nothing(ready: Database, now: datetime) -> None:
    """Loaded and decided, then stopped while another took over: its write is fenced off."""
    sleeper = controller(ready, "a")
    sleeper.tick(now - timedelta(seconds=20))  # takes the lease; the replica's heartbeat is not seen as later than now
    with ready.read() as session:
        rollout = rollouts.active(session)
        assert rollout is not None
        spec, status = load(rollout)
        evidence, commands = gather(session, spec, status, now)
    decision = decide(spec, status, evidence, commands, now)
    assert controller(ready, "b").tick(now) is not None
    before = current(ready), _generation(ready)
    with pytest.raises(LeaseLost, match="held by b with token 2"):
        sleeper.apply(spec, status, evidence, commands, decision, 1, now)
    assert (current(ready), _generation(ready)) == before


def test_killed_between_load_and_apply_nothing_is_half_done(
    ready: Database, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = controller(ready)

    def kill(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "apply", kill)  # after the plan was appended, before the transaction commits
        with pytest.raises(KeyboardInterrupt):
            killed.tick(now)
    assert current(ready).state is RolloutState.READY
    assert _generation(ready) == 1
    again = controller(ready).tick(now)
    assert again is not None
    assert (again.to_state, _generation(ready)) == (RolloutState.RAMPING, 2)


def test_a_rollback_in_the_ledger_is_noticed_and_never_undone(ready: Database, now: datetime) -> None:
    acting = controller(ready)
    acting.tick(now)
    with ready.write() as session:
        plans.roll_back(session, actor="bob", reason="customers complain")
    world.beat(ready, now, (NONE, CHAMPION))
    decision = acting.tick(now + timedelta(seconds=1))
    assert decision is not None
    assert (decision.to_state, decision.reason) == (RolloutState.ROLLING_BACK, "rolled back by bob: customers complain")
    acting.tick(now + timedelta(seconds=2))
    assert current(ready).state is RolloutState.ROLLED_BACK
    assert acting.tick(now + timedelta(seconds=3)) is None
    assert _generation(ready) == 3


def test_traffic_that_cannot_be_measured_stops_neither_an_abort_nor_the_deadline(
    ready: Database, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    acting = controller(ready)
    acting.tick(now)
    monkeypatch.setattr("engine.rollout.loading.MEASURE_S", 0.02)
    monkeypatch.setattr(
        "engine.store.repositories.evidence.newest", lambda session, _: session.execute(text("SELECT pg_sleep(9)"))
    )
    world.beat(ready, now, (NONE, CHAMPION, TRIED))
    decision = acting.tick(now + timedelta(seconds=1))
    assert decision is not None
    assert (decision.verdict, decision.to_state) == (Verdict.ERROR, RolloutState.HELD)
    assert "could not be measured" in decision.reason
    with ready.write() as session:
        commands.ask(session, current(ready).id, "abort", "ann", "enough", "key")
    decision = acting.tick(now + timedelta(seconds=2))
    assert decision is not None
    assert (decision.to_state, decision.action) == (RolloutState.ROLLING_BACK, Action.ROLL_BACK)


def test_a_rollback_during_the_tick_wins_over_its_decision(ready: Database, now: datetime) -> None:
    acting = controller(ready)
    with ready.read() as session:
        rollout = rollouts.active(session)
        assert rollout is not None
        spec, status = load(rollout)
        evidence, commands = gather(session, spec, status, now)
    with ready.write() as session:
        plans.roll_back(session, actor="bob", reason="not now")
    decision = decide(spec, status, evidence, commands, now)
    assert decision.action is Action.SET_WEIGHT
    assert acting.tick(now - timedelta(seconds=9)) is not None  # holds the lease with token 1
    with pytest.raises(SlipstreamError) as caught:
        acting.apply(spec, status, evidence, commands, decision, 1, now)
    assert isinstance(caught.value, StalePlan)


def test_an_hour_without_traffic_blames_nobody(ready: Database, now: datetime) -> None:
    acting = controller(ready)
    for minute in range(60):
        at = now + timedelta(minutes=minute)
        world.beat(ready, at, (NONE, CHAMPION, TRIED))
        acting.tick(at)
    with ready.read() as session:
        decisions = rollouts.decisions(session, current(ready).id)
        plan = plans.latest(session)
    assert current(ready).state is RolloutState.INCONCLUSIVE
    assert {d.verdict for d in decisions} <= {Verdict.INSUFFICIENT, Verdict.STALE}
    assert plan is not None
    assert (plan.champion, plan.arm(CANARY)) == (CHAMPION, None)


def test_a_decision_that_repeats_is_not_written_on_every_tick(ready: Database, now: datetime) -> None:
    acting = controller(ready)
    for second in range(31):
        world.beat(ready, now + timedelta(seconds=second), (NONE, CHAMPION))
        acting.tick(now + timedelta(seconds=second))
    with ready.read() as session:
        assert len(rollouts.decisions(session, current(ready).id)) <= 5


def test_a_command_is_consumed_once_and_recorded(ready: Database, now: datetime) -> None:
    acting = controller(ready)
    acting.tick(now)
    with ready.write() as session:
        asked = commands.ask(session, current(ready).id, "hold", "ann", "lunch", "key-1")
        assert commands.ask(session, current(ready).id, "hold", "ann", "lunch", "key-1") == asked
    for second in (1, 2, 3):
        acting.tick(now + timedelta(seconds=second))
    with ready.read() as session:
        consumed = [d.command_id for d in rollouts.decisions(session, current(ready).id) if d.command_id]
    assert consumed == [asked.id]
    assert current(ready).state is RolloutState.HELD
    with ready.write() as session, pytest.raises(SlipstreamError, match="knows no command"):
        commands.ask(session, current(ready).id, "explode", "ann", "")


def test_a_draft_can_be_cancelled_and_nothing_else(ready: Database, now: datetime) -> None:
    kept, dropped = (launch(ready, canary=TRIED, actor="ann", preset="fast", draft=True, now=now) for _ in range(2))
    with ready.write() as session, pytest.raises(SlipstreamError, match=f"is a draft.*start --draft {kept.id}"):
        commands.ask(session, kept.id, "hold", "ann", "lunch")
    with ready.write() as session:
        asked = commands.ask(session, dropped.id, "abort", "ann", "wrong version", "key-1")
        assert commands.ask(session, dropped.id, "abort", "ann", "wrong version", "key-1") == asked
    with ready.read() as session:
        found = rollouts.get(session, dropped.id)
    assert found is not None
    assert (found.state, found.status["reason"]) == (RolloutState.CANCELLED, "cancelled by ann: wrong version")
    assert told(ready, dropped.id) == ["DRAFT → CANCELLED, cancelled by ann: wrong version"]


def test_a_draft_that_begins_while_somebody_asks_hears_it(
    db: Database, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a draft at the first look and is none at the second."""
    world.versions(db, 3)
    world.first_plan(db, CHAMPION, NONE)
    draft = launch(db, canary=TRIED, actor="ann", preset="fast", draft=True, now=now)
    release(db, draft.id, "ann", now=now)
    get = rollouts.get

    def late(session: WriteSession, rollout_id: int, for_update: bool = False) -> Rollout | None:
        return get(session, rollout_id, for_update) if for_update else draft

    monkeypatch.setattr(rollouts, "get", late)
    with db.write() as session:
        assert commands.ask(session, draft.id, "hold", "bob", "lunch").verb == "hold"


def test_what_was_asked_of_a_draft_does_not_strike_when_it_begins(db: Database, now: datetime) -> None:
    """Such a command was taken once, and may still be in the table."""
    world.versions(db, 3)
    world.first_plan(db, CHAMPION, NONE)
    world.beat(db, now, (NONE, CHAMPION))
    made = launch(db, canary=TRIED, actor="ann", preset="fast", draft=True, now=now)
    with db.write() as session:
        session.add(RolloutCommandRow(rollout_id=made.id, verb="abort", actor="ann", reason="old"))
    release(db, made.id, "bob", now)
    controller(db).tick(now)
    assert current(db).state is RolloutState.RAMPING
    assert told(db, made.id)[0] == "DRAFT → READY, started by bob"


def test_guards_changed_after_launch_end_the_rollout(ready: Database, now: datetime) -> None:
    acting = controller(ready)
    acting.tick(now)
    assert current(ready).state is RolloutState.RAMPING
    with ready.write() as session:
        row = session.get(RolloutRow, current(ready).id)
        assert row is not None
        row.spec = specs.to_dict(replace(specs.preset("fast"), alpha=0.4))
    for second in (1, 2):
        acting.tick(now + timedelta(seconds=second))
        assert current(ready).state is RolloutState.ROLLING_BACK, "the replica routes by the canary's plan still"
    world.beat(ready, now + timedelta(seconds=3), (NONE, CHAMPION, TRIED))
    acting.tick(now + timedelta(seconds=3))
    with ready.read() as session:
        plan = plans.latest(session)
        decisions = rollouts.decisions(session, current(ready).id)
    assert plan is not None
    assert (plan.generation, plan.champion, plan.arms) == (3, CHAMPION, ())
    assert (decisions[-1].verdict, decisions[-1].to_state) == (Verdict.ERROR, RolloutState.INCONCLUSIVE)
    assert "not those it was started with" in decisions[-1].reason


def test_one_rollout_at_a_time_and_none_of_the_champion(ready: Database, now: datetime) -> None:
    with pytest.raises(SlipstreamError, match="one runs at a time"):
        launch(ready, canary=TRIED, actor="ann", preset="fast")
    with pytest.raises(SlipstreamError, match="champion already"):
        launch(ready, canary=CHAMPION, actor="ann", preset="fast")
    with pytest.raises(SlipstreamError, match="no policy version 99"):
        launch(ready, canary=99, actor="ann", preset="fast")


def test_what_passed_the_gate_is_tried_once(db: Database, now: datetime) -> None:
    world.versions(db, 3)
    world.first_plan(db, CHAMPION, NONE)
    assert launch_awaiting(db, "fast", now) is None
    with db.write() as session:
        learning.record(
            session, Attempt(now, now, learning.REGISTERED, "better", 60, 20, {}, 0.1, TRIED, parent_version=CHAMPION)
        )
    made = launch_awaiting(db, "fast", now)
    assert made is not None
    assert (made.canary, made.actor) == (TRIED, "learner")
    assert launch_awaiting(db, "fast", now) is None
    with db.write() as session:
        commands.ask(session, made.id, "abort", "ann", "no")
    world.beat(db, now, (NONE, CHAMPION))
    controller(db).tick(now)
    assert launch_awaiting(db, "fast", now) is None


def told(db: Database, rollout_id: int) -> list[str]:
    """Every transition that notifications and the history know of."""
    with db.read() as session:
        turns = [d for d in rollouts.transitions(session, 0, 100) if d.rollout_id == rollout_id]
    return [f"{d.from_state} → {d.to_state}, {d.reason}" for d in turns]


def _generation(db: Database) -> int:
    with db.read() as session:
        plan = plans.latest(session)
    assert plan is not None
    return plan.generation
