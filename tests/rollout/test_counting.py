"""The controller counts each compared request once, whatever happens to it, and says what it has not counted yet."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import partial

import numpy as np
import pytest
from sqlalchemy import text

from engine.contracts import RolloutState, Verdict
from engine.rollout import controller as controller_module
from engine.rollout.controller import LEASE, Controller
from engine.rollout.records import Action
from engine.store.database import Database
from engine.store.repositories import compared, leases, partitions, rollouts
from engine.store.repositories.leases import LeaseLost
from tests.rollout import database_world as world

NONE, CHAMPION, TRIED = 1, 2, 3
EQUAL, WORSE = 1.0, 0.1


def serve(db: Database, now: datetime, requests: int, tried: float, seed: int = 0) -> None:
    world.beat(db, now, (NONE, CHAMPION, TRIED))
    acceptance = {NONE: 0.0, CHAMPION: EQUAL, TRIED: tried}
    world.serve(db, np.random.default_rng(seed), now, requests, acceptance)


def served(db: Database) -> int:
    with db.read() as session:
        return int(session.scalar(text("SELECT count(*) FROM traces WHERE arm IN ('canary', 'control')")) or 0)


def counted(db: Database) -> tuple[int, int]:
    """Requests in the totals and in the keys, which must agree."""
    with db.read() as session:
        totals = compared.tally(session, 2).totals
        of_keys = session.scalar(text("SELECT coalesce(sum(requests), 0) FROM compared_keys"))
    return sum(t.requests for (_, name), t in totals.items() if name is None), int(of_keys)


@pytest.mark.parametrize("tried", [EQUAL, WORSE])
def test_a_backlog_advances_nothing_and_what_is_counted_of_it_can_fail(
    going: tuple[Database, Controller, datetime], monkeypatch: pytest.MonkeyPatch, tried: float
) -> None:
    db, acting, now = going
    now += timedelta(seconds=10)
    serve(db, now, 400, tried)
    monkeypatch.setattr(compared, "take_in", partial(compared.take_in, limit=150))
    first = acting.tick(now + timedelta(seconds=1))
    assert first is not None
    assert counted(db) == (150, 150)
    assert served(db) > 150
    if tried == WORSE:
        assert (first.verdict, first.action) == (Verdict.FAIL, Action.ROLL_BACK)
        return
    assert (first.verdict, first.to_state) == (Verdict.ERROR, RolloutState.HELD)
    assert "requests are counted up to" in first.reason
    second = acting.tick(now + timedelta(seconds=2))
    assert second is not None
    assert second.to_state is RolloutState.RAMPING
    assert counted(db) == (served(db), served(db))


def test_a_controller_that_is_killed_while_it_counts_counts_nothing_twice(
    going: tuple[Database, Controller, datetime], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """What SIGKILL is to a process."""

    def dies(*_: object) -> None:
        raise Killed

    db, acting, now = going
    for turn in range(4):
        now += timedelta(seconds=16)
        serve(db, now - timedelta(seconds=1), 40, EQUAL, turn)
        with monkeypatch.context() as patch:
            patch.setattr(compared.Tally, "to_json", dies)  # the keys are written by then, in the open transaction
            with pytest.raises(Killed):
                acting.tick(now)
        assert Controller(db, f"b{turn}", 15.0).tick(now + timedelta(seconds=16)) is not None
        now += timedelta(seconds=16)
        acting = Controller(db, f"c{turn}", 15.0)
        assert counted(db) == (served(db), served(db))


def test_who_has_lost_the_lease_counts_nothing(
    going: tuple[Database, Controller, datetime], monkeypatch: pytest.MonkeyPatch
) -> None:
    db, acting, now = going
    serve(db, now + timedelta(seconds=10), 40, EQUAL)
    right = controller_module.load

    def asleep(*args: object) -> object:
        with db.write() as session:
            assert leases.acquire(session, LEASE, "b", now + timedelta(minutes=5), 15.0) == 2
        return right(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(controller_module, "load", asleep)
    with pytest.raises(LeaseLost, match="held by b"):
        acting.tick(now + timedelta(seconds=12))
    assert counted(db) == (0, 0)


def test_who_has_lost_the_lease_deletes_nothing_of_the_next_holder(
    going: tuple[Database, Controller, datetime], monkeypatch: pytest.MonkeyPatch
) -> None:
    db, acting, now = going
    serve(db, now + timedelta(seconds=10), 40, EQUAL)
    acting.tick(now + timedelta(seconds=12))

    def saw_none(*_: object) -> None:
        with db.write() as session:
            assert leases.acquire(session, LEASE, "b", now + timedelta(minutes=5), 15.0) == 2

    monkeypatch.setattr(controller_module.rollouts, "active", saw_none)
    with pytest.raises(LeaseLost, match="held by b"):
        acting.tick(now + timedelta(seconds=13))
    assert counted(db) == (served(db), served(db))


def test_totals_are_forgotten_with_their_last_key(going: tuple[Database, Controller, datetime]) -> None:
    db, acting, now = going
    serve(db, now + timedelta(seconds=10), 40, EQUAL)
    acting.tick(now + timedelta(seconds=12))
    with db.write() as session:
        compared.forget(session, None, limit=1)
    assert counted(db) == (served(db), served(db) - 1)
    with db.write() as session:
        compared.forget(session, None)
    assert counted(db) == (0, 0)


def test_a_replica_whose_clock_is_behind_hides_nothing(going: tuple[Database, Controller, datetime]) -> None:
    db, acting, now = going
    serve(db, now + timedelta(seconds=10), 400, WORSE)
    with db.write() as session:
        partitions.ensure(session, (now - timedelta(hours=1)).date())
        session.execute(text("UPDATE traces SET started_at = started_at - interval '1 hour'"))
    decision = acting.tick(now + timedelta(seconds=12))
    assert decision is not None
    assert counted(db)[0] == served(db) > 0
    assert decision.action is Action.ROLL_BACK


def test_what_began_in_the_warm_up_does_not_count(going: tuple[Database, Controller, datetime]) -> None:
    """Each of these took a second and was written 4.5 s after the stage began, of which 4 are warm-up."""
    db, acting, now = going
    with db.read() as session:
        active = rollouts.active(session)
    assert active is not None
    serve(db, datetime.fromisoformat(active.status["stages"][0]["began"]) + timedelta(seconds=4.5), 40, EQUAL)
    acting.tick(now + timedelta(seconds=30))
    assert counted(db) == (0, 0)


def test_what_was_counted_is_forgotten_once_the_rollout_is_over(going: tuple[Database, Controller, datetime]) -> None:
    db, acting, now = going
    now += timedelta(seconds=10)
    serve(db, now, 400, WORSE)
    decision = acting.tick(now + timedelta(seconds=1))
    while decision is not None:
        now += timedelta(seconds=5)
        world.beat(db, now, (NONE, CHAMPION, TRIED))
        decision = acting.tick(now)
    assert counted(db) == (0, 0)


def test_an_error_in_counting_reaches_the_decision(
    going: tuple[Database, Controller, datetime], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise ZeroDivisionError("nobody foresaw this")

    db, acting, now = going
    monkeypatch.setattr(compared, "take_in", breaks)
    for _ in range(20):
        now += timedelta(seconds=5)
        world.beat(db, now, (NONE, CHAMPION, TRIED))
        decision = acting.tick(now)
        if decision is None:
            break
        last = decision
    assert last.to_state is RolloutState.INCONCLUSIVE
    assert "ZeroDivisionError" in last.reason
