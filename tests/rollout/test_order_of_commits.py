"""Commands and decisions are followed behind a cursor: none may become visible after one with a higher number."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import text

from engine.contracts import RolloutState
from engine.rollout.controller import Controller
from engine.rollout.launch import launch
from engine.store.database import Database, ReadSession, WriteSession
from engine.store.repositories import commands, rollouts
from tests.waiting import until

Going = tuple[Database, Controller, datetime]


def ask(session: WriteSession, rollout_id: int, verb: str) -> None:
    commands.ask(session, rollout_id, verb, "ann", "because")


def one_after_the_other(
    db: Database,
    first: Callable[[WriteSession], Any],
    second: Callable[[WriteSession], Any],
    seen: Callable[[ReadSession], Sequence[Any]],
) -> None:
    """``first`` is written and not committed when ``second`` comes: nothing of the second may be seen before it."""

    def other() -> None:
        with db.write() as session:
            second(session)

    def visible() -> int:
        with db.read() as session:
            return len(seen(session))

    before, late = visible(), threading.Thread(target=other)
    with db.write() as session:
        first(session)
        session.flush()
        late.start()
        until(lambda: waits(db) or not late.is_alive(), "the second waits, or is through")
        assert visible() == before, "it overtook the first, which whoever follows them will never see"
    late.join(60)
    with db.read() as session:
        ids = [one.id for one in seen(session)]
    assert len(ids) == before + 2
    assert ids == sorted(ids)


def waits(db: Database) -> bool:
    with db.read() as session:
        return bool(session.scalar(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")))


def test_what_is_asked_at_the_same_time_is_obeyed_all_of_it(going: Going) -> None:
    """An abort that was committed after a hold with a higher number was never obeyed."""
    db, acting, now = going
    with db.read() as session:
        active = rollouts.active(session)
    assert active is not None
    one_after_the_other(
        db,
        lambda session: ask(session, active.id, "abort"),
        lambda session: ask(session, active.id, "hold"),
        lambda session: commands.asked(session, active.id),
    )
    decision = acting.tick(now)
    assert decision is not None
    assert "aborted by ann" in decision.reason


def test_no_decision_is_passed_over_by_those_who_tell_of_them(going: Going) -> None:
    """A transition of a controller, and a draft that somebody cancels meanwhile."""
    db, _, now = going
    with db.read() as session:
        active = rollouts.active(session)
    assert active is not None
    draft = launch(db, canary=1, actor="ann", preset="fast", draft=True, now=now)
    held = rollouts.moved_by_hand(active.id, active.state, RolloutState.HELD, "held", now, canary=3, champion=2)
    one_after_the_other(
        db,
        lambda session: rollouts.apply(
            session, active.id, expected=active.state, state=RolloutState.HELD, status={}, decision=held, now=now
        ),
        lambda session: ask(session, draft.id, "abort"),
        lambda session: rollouts.transitions(session, 0, 100),
    )


@pytest.mark.parametrize("of", ["commands", "decisions"])
def test_numbers_that_are_handed_out_without_a_turn_are_caught(
    going: Going, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    """The planted fault: nobody waits for anybody."""
    asked, module = (commands, "COMMANDS") if of == "commands" else (rollouts, "DECISIONS")
    monkeypatch.setattr(asked, "locks", Unlocked(module))
    test = test_what_is_asked_at_the_same_time_is_obeyed_all_of_it
    with pytest.raises(AssertionError, match="it overtook the first"):
        (test if of == "commands" else test_no_decision_is_passed_over_by_those_who_tell_of_them)(going)


class Unlocked:
    """The keys of locks, of which one is another each time."""

    def __init__(self, name: str) -> None:
        self._name, self._next = name, iter(range(1, 1_000))

    def __getattr__(self, name: str) -> int:
        from engine.store import locks

        return next(self._next) if name == self._name else int(getattr(locks, name))
