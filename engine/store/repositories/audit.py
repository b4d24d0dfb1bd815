"""What a benchmark or a drill asks of the trace table afterwards: is everything there, once, and when was the last."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from datetime import datetime

from sqlalchemy import func, select, text

from engine.contracts import Status
from engine.store.database import ReadSession
from engine.store.models import RollupDeltaRow, RollupMinuteRow, TraceRow
from engine.store.repositories.overview import Slice


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


def raw_quantiles(session: ReadSession, part: Slice, metric: str, qs: Sequence[float]) -> list[float]:
    """Quantiles in seconds from the traces themselves, at the rank floor(q (n - 1)) that a histogram takes."""
    if metric not in ("ttft", "tpot", "e2e", "queue"):
        raise ValueError(f"no duration {metric!r}")
    of_class = "" if part.traffic_class is None else " AND traffic_class = :class"
    source = f"FROM traces WHERE started_at >= :since AND started_at < :until AND status = 'ok'{of_class}"
    values = {"since": part.since, "until": part.until, "class": part.traffic_class}
    n = session.scalar(text(f"SELECT count({metric}_s) {source}"), values) or 0
    if n == 0:
        return [float("nan")] * len(qs)
    ranks = [(math.floor(q * (n - 1)) + 0.5) / n for q in qs]  # percentile_disc takes the value at rank ceil(f n)
    query = f"SELECT percentile_disc(CAST(:ranks AS float8[])) WITHIN GROUP (ORDER BY {metric}_s) {source}"
    return [float(value) for value in session.scalar(text(query), values | {"ranks": ranks})]


def last_start(session: ReadSession, generation: int, arm: str) -> datetime | None:
    """When the newest request was given to an arm under a generation."""
    return session.scalar(
        select(func.max(TraceRow.started_at)).where(TraceRow.generation == generation, TraceRow.arm == arm)
    )
