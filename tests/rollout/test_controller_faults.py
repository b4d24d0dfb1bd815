"""Controllers that are killed at every transition, and two that race: one writer, nothing half done, a record that
replays.

The processes are real and so is SIGKILL. It strikes when the decision of a transition is written and not committed, and
then once more, in the next controller, right after its commit. Times are told to the processes, nobody waits for them.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import numpy as np
import pytest

from engine.contracts import RolloutState
from engine.rollout.launch import launch
from engine.rollout.replay import replay
from engine.store.database import Database
from engine.store.repositories import plans, rollouts
from engine.store.repositories.rollouts import DecisionRecord
from tests.rollout import database_world as world

NONE, CHAMPION, TRIED = 1, 2, 3
BETTER, WORSE = 1.6, 0.1
LEASE_S = 15.0
MOST_ROUNDS = 60
PATHS = [
    pytest.param(BETTER, ["RAMPING", "SOAKING", "PROMOTING", "PROMOTED", "WATCHING", "DONE"], marks=pytest.mark.slow),
    (WORSE, ["RAMPING", "ROLLING_BACK", "ROLLED_BACK"]),
]
CHILD = """
import os, signal, sys
from datetime import datetime
from sqlalchemy import event
from sqlalchemy.orm import Session
from engine.contracts import SlipstreamError
from engine.rollout.controller import Controller
from engine.store.database import Database

url, holder, moment = sys.argv[1:]
database, written, tokens = Database(url), [], []

def note(connection, cursor, statement, values, *_):
    if statement.startswith("INSERT INTO rollout_decisions"):
        tokens.append(values["fencing_token"])
        if values["from_state"] != values["to_state"] or values["action"] != "none":
            written.append(values["to_state"])

def strike(*_):
    if written:
        os.kill(os.getpid(), signal.SIGKILL)

event.listen(database.engine, "before_cursor_execute", note)
if moment == "before":
    event.listen(database.engine, "commit", strike)
if moment == "after":
    event.listen(Session, "after_commit", strike)
controller = Controller(database, holder, 15.0)
print("ready", flush=True)
for line in sys.stdin:
    tokens.clear()
    try:
        decision = controller.tick(datetime.fromisoformat(line.strip()))
        print("idle" if decision is None else decision.to_state.value, *tokens, flush=True)
    except SlipstreamError as error:
        print(type(error).__name__, flush=True)
"""


class Child:
    """A controller in a process of its own."""

    def __init__(self, url: str, holder: str, moment: str) -> None:
        argv = [sys.executable, "-c", CHILD, url, holder, moment]
        self.moment, self.tokens = moment, set[int]()  # those it wrote decisions under
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, now: datetime) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(now.isoformat() + "\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        """What became of the tick; empty where it killed the process."""
        assert self._process.stdout is not None
        said, *tokens = self._process.stdout.readline().split() or [""]
        self.tokens |= set(map(int, tokens))
        return said if said != "ready" else self.answer()

    def tick(self, now: datetime) -> str:
        self.ask(now)
        return self.answer()

    def died(self) -> int:
        return self._process.wait(timeout=60)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def children() -> Iterator[list[Child]]:
    """Those that are appended here are gone at the end."""
    found: list[Child] = []
    try:
        yield found
    finally:
        for one in found:
            one.end()


@pytest.fixture
def began(db: Database) -> datetime:
    now = datetime.now(UTC)
    world.versions(db, 3)
    world.first_plan(db, CHAMPION, NONE)
    world.beat(db, now, (NONE, CHAMPION, TRIED))
    launch(db, canary=TRIED, actor="ann", preset="fast", now=now)
    return now


@pytest.mark.parametrize(("tried", "path"), PATHS)
def test_killed_at_every_transition_the_next_one_goes_on(
    db: Database, database_url: str, began: datetime, tried: float, path: list[str]
) -> None:
    now, rng, kills = began, np.random.default_rng(0), 0
    with children() as alive:
        acting, waiting = Child(database_url, "c0", "before"), Child(database_url, "c1", "after")
        alive += [acting, waiting]
        for _ in range(MOST_ROUNDS):
            now = traffic(db, rng, now + timedelta(seconds=5), tried)
            before, said, after = standing(db), acting.tick(now), standing(db)
            if said:
                assert said in [*RolloutState]
                assert after[:2] == before[:2], "it lives, so this was no transition"
                continue
            assert acting.died() == -signal.SIGKILL
            kills += 1
            if acting.moment == "before":
                assert after == before, "a transaction that was not committed has left something"
            else:
                assert after[2] == before[2] + 1
                assert after[:2] != before[:2]
            if after[0] == path[-1]:
                break
            acting, waiting = waiting, Child(database_url, f"c{len(alive)}", acting.moment)
            alive.append(waiting)
            assert acting.tick(now + timedelta(seconds=LEASE_S - 1)) == "idle", "the dead one's lease has not ended"
            now += timedelta(seconds=LEASE_S)
    found, decisions = record(db)
    assert path_of(decisions) == path
    check(found, decisions)
    turns = [d for d in decisions if d.from_state is not d.to_state or d.action != "none"]
    assert kills == 2 * len(turns)
    assert len({d.fencing_token for d in turns}) == len(turns), "each by a later holder than the one before"
    assert [d.action for d in decisions].count("promote") == (tried == BETTER)


@pytest.mark.parametrize(("tried", "path"), PATHS)
def test_two_that_race_make_one_rollout(
    db: Database, database_url: str, began: datetime, tried: float, path: list[str]
) -> None:
    """Both tick at once, and to the one whose clock is ahead the other's lease has always ended."""
    now, rng = began, np.random.default_rng(0)
    with children() as alive:
        first, second = Child(database_url, "a", "never"), Child(database_url, "b", "never")
        alive += [first, second]
        answers = []
        for _ in range(MOST_ROUNDS):
            now = traffic(db, rng, now + timedelta(seconds=20), tried)
            ahead = now + timedelta(seconds=LEASE_S + 1)
            world.beat(db, ahead, (NONE, CHAMPION, TRIED))
            first.ask(now)
            second.ask(ahead)
            answers += [first.answer(), second.answer()]
            first, second = second, first
            if standing(db)[0] == path[-1]:
                break
    assert set(answers) <= {"idle", "LeaseLost", *RolloutState}
    found, decisions = record(db)
    assert path_of(decisions) == path
    check(found, decisions)
    a, b = alive
    assert not a.tokens & b.tokens, "two have written under one token"
    assert a.tokens | b.tokens == {d.fencing_token for d in decisions}
    turns = [(d.from_state, d.to_state) for d in decisions if d.from_state is not d.to_state]
    assert len(turns) == len(set(turns)), "a transition was made twice"


def traffic(db: Database, rng: np.random.Generator, now: datetime, tried: float) -> datetime:
    world.beat(db, now, (NONE, CHAMPION, TRIED))
    world.serve(db, rng, now, 30, {NONE: 0.0, CHAMPION: 1.0, TRIED: tried})
    return now


def standing(db: Database) -> tuple[str, int, int]:
    """(state, newest generation, number of decisions)."""
    found, decisions = record(db)
    with db.read() as session:
        plan = plans.latest(session)
    assert plan is not None
    return found.state.value, plan.generation, len(decisions)


def record(db: Database) -> tuple[rollouts.Rollout, list[DecisionRecord]]:
    with db.read() as session:
        found = rollouts.list_rollouts(session)[0]
        return found, [d for d in rollouts.decisions(session, found.id) if d.fencing_token]  # of a controller


def path_of(decisions: Sequence[DecisionRecord]) -> list[str]:
    states = [d.to_state.value for d in decisions]
    return states[:1] + [after for before, after in pairwise(states) if after != before]


def check(found: rollouts.Rollout, decisions: Sequence[DecisionRecord]) -> None:
    """Every decision follows from the one before, made by whoever held the lease then, and comes out again."""
    tokens = [d.fencing_token for d in decisions]
    assert tokens == sorted(tokens)
    assert all(earlier.to_state is later.from_state for earlier, later in pairwise(decisions))
    made = [d.generation for d in decisions if d.action != "none"]
    assert made == sorted(set(made)), "each plan was appended by one decision"
    assert replay(found, decisions).agrees
