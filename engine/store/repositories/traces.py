"""Single traces: a filtered list, and one with its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import UnaryExpression, func, select

from engine.store.database import ReadSession
from engine.store.models import TracePayloadRow, TraceRow
from engine.store.repositories.overview import Slice

LISTED = (
    TraceRow.started_at,
    TraceRow.trace_id,
    TraceRow.traffic_class,
    TraceRow.arm,
    TraceRow.policy_version,
    TraceRow.status,
    TraceRow.e2e_s,
    TraceRow.ttft_s,
    TraceRow.tpot_s,
    TraceRow.prompt_tokens,
    TraceRow.output_tokens,
    TraceRow.steps,
    TraceRow.drafted,
    TraceRow.accepted,
    TraceRow.retry,
    TraceRow.tenant,
    TraceRow.error,
)
ORDERS: dict[str, UnaryExpression[Any]] = {
    "newest": TraceRow.started_at.desc(),
    "slowest": TraceRow.e2e_s.desc(),
    "most drafted": TraceRow.drafted.desc(),
}


@dataclass(frozen=True, slots=True)
class Trace:
    """One trace; ``payload`` None where its tokens were not kept or are past their retention."""

    row: TraceRow
    payload: TracePayloadRow | None


def listed(
    session: ReadSession,
    part: Slice,
    status: str | None = None,
    order: str = "newest",
    limit: int = 500,
    trace_ids: list[UUID] | None = None,
) -> list[dict[str, Any]]:
    """The traces of a slice, sorted and cut by the server."""
    query = select(*LISTED).where(TraceRow.started_at >= part.since, TraceRow.started_at < part.until)
    if part.traffic_class is not None:
        query = query.where(TraceRow.traffic_class == part.traffic_class)
    if part.arm is not None:
        query = query.where(TraceRow.arm == part.arm)
    if part.version is not None:
        query = query.where(TraceRow.policy_version == part.version)
    if status is not None:
        query = query.where(TraceRow.status == status)
    if trace_ids is not None:
        query = query.where(TraceRow.trace_id.in_(trace_ids))
    return [dict(row) for row in session.execute(query.order_by(ORDERS[order]).limit(limit)).mappings()]


def arms(session: ReadSession, generation: int, since: datetime) -> dict[str, int]:
    """Requests per arm that were assigned by one generation of the ledger: the observed split."""
    query = (
        select(TraceRow.arm, func.count())
        .where(TraceRow.started_at >= since, TraceRow.generation == generation)
        .group_by(TraceRow.arm)
    )
    return {row[0]: row[1] for row in session.execute(query)}


def one(session: ReadSession, trace_id: UUID) -> Trace | None:
    row = session.scalar(select(TraceRow).where(TraceRow.trace_id == trace_id))
    if row is None:
        return None
    payload = session.scalar(
        select(TracePayloadRow).where(
            TracePayloadRow.started_at == row.started_at, TracePayloadRow.trace_id == trace_id
        )
    )
    return Trace(row, payload)
