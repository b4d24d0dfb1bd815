"""What a benchmark or a drill asks of the trace table afterwards: is everything there, once, and when was the last."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import func, select

from engine.contracts import Status
from engine.store.database import ReadSession
from engine.store.models import RollupDeltaRow, RollupMinuteRow, TraceRow


def traces(session: ReadSession) -> int:
    return session.scalar(select(func.count()).select_from(TraceRow)) or 0


def not_ok(session: ReadSession) -> int:
    """Traces that ended in anything but success."""
    return session.scalar(select(func.count()).where(TraceRow.status != Status.OK)) or 0


def times_stored(session: ReadSession, request_ids: Collection[str]) -> dict[str, int]:
    """How often each of these requests is in the table; one that is missing is absent here."""
    query = (
        select(TraceRow.request_id, func.count())
        .where(TraceRow.request_id.in_(request_ids))
        .group_by(TraceRow.request_id)
    )
    return dict(session.execute(query).all())


def rolled_up(session: ReadSession) -> int:
    """Requests the rollups know of; equal to ``traces`` when nothing was lost or counted twice."""
    counted = (
        select(func.coalesce(func.sum(t.requests), 0)).scalar_subquery() for t in (RollupDeltaRow, RollupMinuteRow)
    )
    left, merged = session.execute(select(*counted)).one()
    return int(left + merged)


def last_start(session: ReadSession, generation: int, arm: str) -> datetime | None:
    """When the newest request was given to an arm under a generation."""
    return session.scalar(
        select(func.max(TraceRow.started_at)).where(TraceRow.generation == generation, TraceRow.arm == arm)
    )
