"""Traces in the order they were written, for exporters that keep a cursor."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import delete, func, select, text, tuple_
from sqlalchemy.dialects.postgresql import insert

from engine.store.database import ReadSession, WriteSession
from engine.store.models import ExportCursorRow, TraceRow

HORIZON = (
    "SELECT least(coalesce(CAST(:now AS timestamptz), statement_timestamp()), min(xact_start)) FROM pg_stat_activity "
    "WHERE backend_xid IS NOT NULL AND datname = current_database() AND pid <> pg_backend_pid()"
)


COUNTED = 100_000


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far an exporter has come; ``written_at`` None means it has not begun."""

    name: str
    written_at: datetime | None = None
    trace_id: UUID | None = None
    exported: int = 0
    skipped: int = 0
    refused: int = 0
    error: str | None = None


def cursor(session: ReadSession | WriteSession, name: str) -> Cursor:
    row = session.get(ExportCursorRow, name)
    return Cursor(name) if row is None else _cursor(row)


def cursors(session: ReadSession | WriteSession, prefix: str) -> list[Cursor]:
    """Those whose name begins so, the one first that was not saved for longest."""
    begin = ExportCursorRow.name.startswith(prefix, autoescape=True)
    query = select(ExportCursorRow).where(begin).order_by(ExportCursorRow.updated_at, ExportCursorRow.name)
    return [_cursor(row) for row in session.scalars(query)]


def remove_cursor(session: WriteSession, name: str) -> None:
    session.execute(delete(ExportCursorRow).where(ExportCursorRow.name == name))


def remove_cursors(session: WriteSession, prefix: str) -> None:
    """What they had sent is lost there: it is sent again."""
    session.execute(delete(ExportCursorRow).where(ExportCursorRow.name.startswith(prefix, autoescape=True)))


def _cursor(row: ExportCursorRow) -> Cursor:
    return Cursor(row.name, row.written_at, row.trace_id, row.exported, row.skipped, row.refused, row.error)


def save_cursor(session: WriteSession, moved: Cursor, now: datetime) -> None:
    values = {
        "name": moved.name,
        "written_at": moved.written_at,
        "trace_id": moved.trace_id,
        "exported": moved.exported,
        "skipped": moved.skipped,
        "refused": moved.refused,
        "error": moved.error,
        "updated_at": now,
    }
    session.execute(
        insert(ExportCursorRow).values(**values).on_conflict_do_update(index_elements=["name"], set_=values)
    )


def settled_before(session: ReadSession | WriteSession, now: datetime | None = None) -> datetime:
    """The instant up to which traces are complete.

    Rows of a transaction that is still open are older than its start. The horizon therefore stops at the start of the
    oldest transaction that writes now, or a trace committed late would be passed over for ever. The clock is that of
    before the look at them: who begins to write after it has been looked at is younger. ``now`` is
    an earlier reading of that clock.
    """
    horizon = session.scalar(text(HORIZON), {"now": now})
    assert isinstance(horizon, datetime)
    return horizon


def next_traces(session: ReadSession, after: Cursor, limit: int) -> list[TraceRow]:
    """The traces written after the cursor, oldest first, as far as they are complete."""
    query = select(TraceRow).where(TraceRow.written_at < settled_before(session))
    if after.written_at is not None:
        position = tuple_(TraceRow.written_at, TraceRow.trace_id)
        query = query.where(
            TraceRow.written_at >= after.written_at,  # the index condition; the pair below breaks ties
            position > tuple_(after.written_at, after.trace_id),
        )
    return list(session.scalars(query.order_by(TraceRow.written_at, TraceRow.trace_id).limit(limit)))


def lag(session: ReadSession, after: Cursor) -> dict[str, Any]:
    """How many traces wait for export, counted up to COUNTED, and since when the oldest does."""
    waiting, some = select(func.min(TraceRow.written_at)), select(TraceRow.written_at)
    if after.written_at is not None:
        waiting, some = (query.where(TraceRow.written_at > after.written_at) for query in (waiting, some))
    oldest = session.scalar(waiting)
    count = session.scalar(select(func.count()).select_from(some.limit(COUNTED).subquery()))
    return {"waiting": count, "oldest": oldest}
