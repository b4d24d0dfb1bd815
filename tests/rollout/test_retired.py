"""A version that was retired for good is neither tried nor gone back to, and a rollback is never refused for it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from engine.contracts import RolloutState, SlipstreamError
from engine.rollout import specs
from engine.rollout.launch import launch
from engine.rollout.records import Action
from engine.store.database import Database
from engine.store.models import RolloutRow
from engine.store.repositories import plans, policies
from tests.rollout import database_world as world
from tests.rollout.test_controller import CHAMPION, NONE, TRIED, controller, current, now, ready, run

__all__ = ["now", "ready"]  # fixtures


def retire(db: Database, version: int, now: datetime) -> None:
    with db.write() as session:
        policies.retire(session, [version], "forgotten", now)


def test_a_retired_version_is_not_tried(ready: Database, now: datetime) -> None:
    retire(ready, TRIED, now)
    decision = controller(ready).tick(now)
    assert decision is not None
    assert (decision.to_state, decision.action) == (RolloutState.READY, Action.NONE)
    assert decision.reason == f"there is no policy version {TRIED} that may be served"
    with pytest.raises(SlipstreamError, match=f"v{TRIED} was retired"):
        launch(ready, canary=TRIED, actor="ann", preset="fast")


def test_a_rollback_is_not_refused_where_the_champion_was_retired(ready: Database, now: datetime) -> None:
    now = run(ready, now, 1.0, lambda found: found is RolloutState.RAMPING)
    retire(ready, CHAMPION, now)
    run(ready, now, 1.0, lambda found: found is RolloutState.ROLLED_BACK, rate=1.0)
    assert _champion(ready) == NONE


def test_nor_is_giving_up_what_was_promoted(ready: Database, now: datetime) -> None:
    now = run(ready, now, 1.6, lambda found: found is RolloutState.WATCHING)
    retire(ready, CHAMPION, now)
    with ready.write() as session:
        row = session.get(RolloutRow, current(ready).id)
        assert row is not None
        row.spec = specs.to_dict(replace(specs.preset("fast"), alpha=0.4))
    for second, state in ((1, RolloutState.ROLLING_BACK), (2, RolloutState.INCONCLUSIVE)):
        world.beat(ready, now + timedelta(seconds=second), (NONE, CHAMPION, TRIED))
        controller(ready).tick(now + timedelta(seconds=second))
        assert (current(ready).state, _champion(ready)) == (state, NONE)


def _champion(db: Database) -> int:
    with db.read() as session:
        plan = plans.latest(session)
    assert plan is not None
    return plan.champion
