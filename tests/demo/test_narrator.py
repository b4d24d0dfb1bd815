"""The story tells each event once, and nothing of before."""

from __future__ import annotations

from pathlib import Path

from engine.demo.narrator import Narrator
from engine.store.database import Database
from engine.store.repositories import plans
from tests.app.seed import seed


def test_each_event_is_told_once(db: Database, tmp_path: Path) -> None:
    seed(db, tmp_path / "spill")
    narrator = Narrator(0, 0, 0)
    with db.read() as session:
        told = list(narrator.lines(session))
        assert any(line.startswith("learner: v3 registered") for line in told)
        assert any("and its control on" in line for line in told)
        assert list(narrator.lines(session)) == []


def test_a_second_story_begins_now(db: Database, tmp_path: Path) -> None:
    seed(db, tmp_path / "spill")
    with db.read() as session:
        narrator = Narrator.from_now(session)
        assert list(narrator.lines(session)) == []
    with db.write() as session:
        made = plans.roll_back(session, actor="test", reason="enough")
    with db.read() as session:
        (line,) = narrator.lines(session)
    assert line.startswith(f"generation {made.generation}: v3 is champion")
