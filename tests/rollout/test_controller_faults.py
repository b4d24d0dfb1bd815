"""A controller that is killed at every transition, and one that takes over: nothing is half done, one writer acts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from engine.contracts import RolloutState
from engine.rollout.controller import Controller
from engine.rollout.launch import launch
from engine.rollout.replay import replay
from engine.store.database import Database
from engine.store.repositories import plans, rollouts
from tests.rollout import database_world as world

NONE, CHAMPION, TRIED = 1, 2, 3
BETTER, WORSE = 1.6, 0.1


class Killed(BaseException):
    """What SIGKILL is to a process: nothing catches it."""


@pytest.mark.parametrize(
    ("tried", "path"),
    [
        (BETTER, ["RAMPING", "SOAKING", "PROMOTING", "PROMOTED", "WATCHING", "DONE"]),
        (WORSE, ["RAMPING", "ROLLING_BACK", "ROLLED_BACK"]),
    ],
)
def test_killed_at_every_transition_the_next_one_goes_on(
    db: Database, monkeypatch: pytest.MonkeyPatch, tried: float, path: list[str]
) -> None:
    """Each tick is first made by a controller that dies before its commit, then by another once the lease has ended."""
    now, rng = datetime.now(UTC), np.random.default_rng(0)
    world.versions(db, 3)
    world.first_plan(db, CHAMPION, NONE)
    world.beat(db, now, (NONE, CHAMPION, TRIED))
    launch(db, canary=TRIED, actor="ann", preset="fast", now=now)
    for turn in range(60):
        if standing(db)[0] == path[-1]:
            break
        now += timedelta(seconds=16)  # the lease of whoever died has ended
        world.beat(db, now, (NONE, CHAMPION, TRIED))
        world.serve(db, rng, now, 30, {NONE: 0.0, CHAMPION: 1.0, TRIED: tried})
        before = standing(db)
        with monkeypatch.context() as patch:
            patch.setattr(rollouts, "apply", _die)  # the plan is appended by then, and its transaction open
            with pytest.raises(Killed):
                Controller(db, f"dies-{turn}", 15.0).tick(now)
        assert standing(db) == before
        assert Controller(db, "too-early", 15.0).tick(now + timedelta(seconds=14)) is None
        now += timedelta(seconds=15)
        world.beat(db, now, (NONE, CHAMPION, TRIED))
        assert Controller(db, f"lives-{turn}", 15.0).tick(now) is not None
    with db.read() as session:
        found = rollouts.list_rollouts(session)[0]
        decisions = rollouts.decisions(session, found.id)
        history = plans.history(session, limit=50)
    states = [d.to_state.value for d in decisions]
    assert [s for i, s in enumerate(states) if i == 0 or states[i - 1] != s] == path
    tokens = [d.fencing_token for d in decisions]
    assert tokens == sorted(set(tokens))  # every decision by a later holder than the one before
    assert len({plan.generation for plan in history}) == len(history)
    assert [d.action for d in decisions if d.action != "none"].count("promote") == (tried == BETTER)
    assert replay(found.spec, decisions) == []


def standing(db: Database) -> tuple[str, int, int]:
    """(state, newest generation, number of decisions)."""
    with db.read() as session:
        found = rollouts.list_rollouts(session)[0]
        plan = plans.latest(session)
        assert plan is not None
        return RolloutState(found.state).value, plan.generation, len(rollouts.decisions(session, found.id))


def _die(*args: object, **kwargs: object) -> None:
    raise Killed
