"""How far each sink of notifications has come."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert

from engine.store.database import ReadSession, WriteSession
from engine.store.models import NotificationCursorRow


@dataclass(frozen=True, slots=True)
class Cursor:
    """``decision_id`` is the last one a sink is through with; the next failed ``tries`` times, due ``next_at``."""

    sink: str
    decision_id: int
    tries: int
    next_at: datetime
    error: str | None


def cursor(session: WriteSession, sink: str, newest: int, now: datetime) -> Cursor:
    """Where a sink stands; a new one begins after the ``newest`` decision, what was before is not news."""
    session.execute(
        insert(NotificationCursorRow)
        .values(sink=sink, decision_id=newest, tries=0, next_at=now, error=None)
        .on_conflict_do_nothing()
    )
    row = session.get_one(NotificationCursorRow, sink)
    return Cursor(row.sink, row.decision_id, row.tries, row.next_at, row.error)


def standings(session: ReadSession | WriteSession) -> list[Cursor]:
    """Every sink that was ever told something, with its last error."""
    rows = session.scalars(select(NotificationCursorRow).order_by(NotificationCursorRow.sink))
    return [Cursor(row.sink, row.decision_id, row.tries, row.next_at, row.error) for row in rows]


def advance(session: WriteSession, to: Cursor) -> None:
    """Move a sink's cursor; never back behind what another notifier is through with."""
    row = session.get_one(NotificationCursorRow, to.sink, with_for_update=True, populate_existing=True)
    if to.decision_id < row.decision_id:
        return
    row.decision_id, row.tries, row.next_at, row.error = to.decision_id, to.tries, to.next_at, to.error
