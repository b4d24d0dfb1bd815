"""Controllers that are killed at every transition, and two that race: one writer, nothing half done, a record that
replays.

The processes are real and so is SIGKILL. It strikes when the decision of a transition is written and not committed, and
then once more, in the next controller, right after its commit. Times are told to the processes, nobody waits for them.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import numpy as np
import pytest
from sqlalchemy import text

from engine.contracts import RolloutState
from engine.rollout import specs
from engine.rollout.guards import RolloutSpec, Shadow
from engine.rollout.launch import launch
from engine.rollout.replay import replay
from engine.store.database import Database
from engine.store.repositories import commands, rollouts
from engine.store.repositories.rollouts import DecisionRecord
from tests.rollout import database_world as world
from tests.rollout.struck import LEASE_S, Child

NONE, CHAMPION, TRIED = 1, 2, 3
BETTER, WORSE = 1.6, 0.1
MOST_ROUNDS = 90
FAST = specs.preset("fast")
SHADOWED = replace(FAST, shadow=Shadow(40))


@dataclass(frozen=True)
class Journey:
    """What a rollout goes through. ``asked``: in which state somebody asks for what, in this order; ``tried``: the
    accepted tokens per verify step of the canary, None for no traffic at all, from a state of the path on."""

    path: str
    spec: RolloutSpec = FAST
    tried: Mapping[str, float | None] = field(default_factory=lambda: {"": BETTER})
    asked: tuple[tuple[str, str], ...] = ()


PROMOTED = "RAMPING SOAKING PROMOTING PROMOTED WATCHING DONE"
BAD = Journey("RAMPING ROLLING_BACK ROLLED_BACK", tried={"": WORSE})
HOLDS = "READY HELD SHADOW HELD RAMPING HELD SOAKING HELD"
PROMOTED_AFTER_EVERY_HOLD = Journey(
    "HELD READY SHADOW HELD SHADOW RAMPING HELD RAMPING SOAKING HELD SOAKING PROMOTING PROMOTED WATCHING DONE",
    SHADOWED,
    asked=tuple((state, "hold" if state != "HELD" else "resume") for state in HOLDS.split()),
)
JOURNEYS = {
    "promoted after every hold": PROMOTED_AFTER_EVERY_HOLD,
    "bad": BAD,
    "bad while held": Journey(
        "RAMPING HELD ROLLING_BACK ROLLED_BACK", tried={"": BETTER, "HELD": WORSE}, asked=(("RAMPING", "hold"),)
    ),
    "bad in shadow": Journey("SHADOW ROLLING_BACK ROLLED_BACK", SHADOWED, {"": WORSE}),
    "aborted in a held shadow": Journey(
        "SHADOW HELD ROLLING_BACK CANCELLED", SHADOWED, asked=(("SHADOW", "hold"), ("HELD", "abort"))
    ),
    "without traffic": Journey("RAMPING HELD ROLLING_BACK INCONCLUSIVE", replace(FAST, deadline_s=150.0), {"": None}),
}


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
    return now


@pytest.mark.parametrize(
    "name", [name if name == "bad" else pytest.param(name, marks=pytest.mark.slow) for name in JOURNEYS]
)
def test_killed_at_every_transition_the_next_one_goes_on(
    db: Database, database_url: str, began: datetime, name: str
) -> None:
    killed_at_every_transition(db, database_url, began, JOURNEYS[name])


def test_a_plan_that_is_committed_before_its_decision_is_caught(
    db: Database, database_url: str, began: datetime
) -> None:
    """The planted fault of the test above."""
    with pytest.raises(AssertionError, match="a transaction that was not committed has left something"):
        killed_at_every_transition(db, database_url, began, BAD, torn=True)


def killed_at_every_transition(
    db: Database, database_url: str, began: datetime, journey: Journey, torn: bool = False
) -> None:
    now, rng, kills = began, np.random.default_rng(0), 0
    path, wishes = journey.path.split(), list(journey.asked)
    launch(db, canary=TRIED, actor="ann", spec=journey.spec, now=now)
    with children() as alive:
        acting, waiting = Child(database_url, "c0", "before", torn), Child(database_url, "c1", "after")
        alive += [acting, waiting]
        for _ in range(MOST_ROUNDS):
            now = traffic(db, rng, now + timedelta(seconds=5), journey)
            if wishes and standing(db)[0] == wishes[0][0]:
                ask(db, wishes.pop(0)[1])
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
    assert [d.action for d in decisions].count("promote") == (path[-1] == "DONE")
    answered = [d.command_id for d in decisions if d.command_id is not None]
    assert len(answered) == len(set(answered)) == len(journey.asked), "each was obeyed once"


@pytest.mark.parametrize("journey", [pytest.param(Journey(PROMOTED), marks=pytest.mark.slow), BAD], ids=["good", "bad"])
def test_two_that_race_make_one_rollout(db: Database, database_url: str, began: datetime, journey: Journey) -> None:
    """Both tick at once, and to the one whose clock is ahead the other's lease has always ended."""
    now, rng, path = began, np.random.default_rng(0), journey.path.split()
    launch(db, canary=TRIED, actor="ann", spec=journey.spec, now=now)
    with children() as alive:
        first, second = Child(database_url, "a", "never"), Child(database_url, "b", "never")
        alive += [first, second]
        answers = []
        for _ in range(MOST_ROUNDS):
            now = traffic(db, rng, now + timedelta(seconds=20), journey)
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


def traffic(db: Database, rng: np.random.Generator, now: datetime, journey: Journey) -> datetime:
    """A heartbeat, and what was served since the last one; copies for a shadow where there is one."""
    world.beat(db, now, (NONE, CHAMPION, TRIED))
    state, generation, _ = standing(db)
    tried = journey.tried.get(state, journey.tried[""])
    if tried is None:
        return now
    world.serve(db, rng, now, 30, {NONE: 0.0, CHAMPION: 1.0, TRIED: tried})
    if journey.spec.shadow is not None and state in ("SHADOW", "HELD"):
        world.draft_in_shadow(db, rng, generation, 15, {CHAMPION: 1.0, TRIED: tried})
    return now


def ask(db: Database, verb: str) -> None:
    with db.write() as session:
        commands.ask(session, rollouts.list_rollouts(session)[0].id, verb, "ann", "because")


def standing(db: Database) -> tuple[str, int, int]:
    """(state, newest generation, number of decisions of a controller)."""
    with db.read() as session:
        found = session.execute(
            text(
                "SELECT state, (SELECT max(generation) FROM serving_plans), "
                "(SELECT count(*) FROM rollout_decisions WHERE fencing_token > 0) FROM rollouts"
            )
        ).one()
    return found[0], found[1], found[2]


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
