from __future__ import annotations

from datetime import UTC, datetime

import pytest

from engine.rollout.controller import Controller
from engine.rollout.launch import launch
from engine.store.database import Database
from tests.rollout import database_world as world


@pytest.fixture
def going(db: Database) -> tuple[Database, Controller, datetime]:
    """Version 3 as a canary that has just been put before traffic; 2 is the champion, 1 plain decoding."""
    now = datetime.now(UTC)
    world.versions(db, 3)
    world.first_plan(db, champion=2, fallback=1)
    world.beat(db, now, (1, 2))
    launch(db, canary=3, actor="ann", preset="fast", now=now)
    acting = Controller(db, "a", 15.0)
    acting.tick(now)
    return db, acting, now
