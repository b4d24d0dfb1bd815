"""Single traces: a filtered list by pages, and one with its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, UnaryExpression, func, select

from engine.contracts import Status
from engine.store import histogram
from engine.store.database import ReadSession
from engine.store.models import TracePayloadRow, TraceRow
from engine.store.repositories import overview
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
    TraceRow.queue_s,
    TraceRow.prompt_tokens,
    TraceRow.output_tokens,
    TraceRow.steps,
    TraceRow.drafted,
    TraceRow.accepted,
    TraceRow.retry,
    TraceRow.preemptions,
    TraceRow.tenant,
    TraceRow.replica_id,
    TraceRow.assignment_key,
    TraceRow.error,
)
ORDERS: dict[str, tuple[ColumnElement[Any] | UnaryExpression[Any], ...]] = {
    "newest": (TraceRow.started_at.desc(), TraceRow.trace_id.asc()),
    "slowest": (TraceRow.e2e_s.desc(), TraceRow.trace_id.asc()),
}
COUNTED = 100_000
"""Matches of a filter that rollups do not know are counted to here and not further."""


@dataclass(frozen=True, slots=True)
class Filter:
    """What of a slice is listed; None means all. Durations are seconds, ``conversation`` is the assignment key;
    ``failed`` are the requests that ended in an error or a timeout."""

    status: str | None = None
    tenant: str | None = None
    conversation: str | None = None
    min_e2e_s: float | None = None
    max_e2e_s: float | None = None
    trace_ids: tuple[UUID, ...] | None = None
    failed: bool = False

    @property
    def is_empty(self) -> bool:
        return self == Filter()


@dataclass(frozen=True, slots=True)
class Trace:
    """One trace; ``payload`` None where its tokens were not kept or are past their retention."""

    row: TraceRow
    payload: TracePayloadRow | None


def listed(
    session: ReadSession,
    part: Slice,
    chosen: Filter = Filter(),
    order: str = "newest",
    limit: int = 200,
    offset: int = 0,
) -> list[dict[str, Any]]:
    """One page of the traces of a slice, sorted and cut by the server."""
    wanted = _conditions(session, part, chosen)
    query = select(*LISTED).where(*wanted).order_by(*ORDERS[order]).limit(limit).offset(offset)
    if order == "slowest" and chosen.is_empty and (least := _slow_from(session, part, offset + limit)) is not None:
        slow = query.where(TraceRow.e2e_s >= least, *_of_every_class(session, part))
        rows = session.execute(slow).mappings().all()
        if len(rows) == limit:
            return [dict(row) for row in rows]
    return [dict(row) for row in session.execute(query).mappings()]


def matching(session: ReadSession, part: Slice, chosen: Filter) -> tuple[int, bool]:
    """How many traces match, and whether that is all of them: from the rollups where they know, else up to COUNTED."""
    if chosen.is_empty:
        rows = overview.sums(session, part)
        return (rows[0]["requests"] if rows else 0), True
    some = select(TraceRow.trace_id).where(*_conditions(session, part, chosen)).limit(COUNTED).subquery()
    found = session.scalar(select(func.count()).select_from(some)) or 0
    return found, found < COUNTED


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


def _slow_from(session: ReadSession, part: Slice, many: int) -> float | None:
    """Seconds that more than ``many`` traces of the slice took at least, by the rollups; None where there are fewer.

    It lets Postgres take the slow end of each class from an index where it would otherwise sort a whole month.
    """
    found = overview.grouped(session, part, "e2e")
    if not found.table.counts.size:
        return None
    slower = found.table.counts[0][::-1].cumsum()
    enough = (slower > 1.2 * many + 50).argmax()
    if slower[enough] <= 1.2 * many + 50:
        return None
    return histogram.upper(found.table.first + len(slower) - 1 - int(enough) - 1)


def _of_every_class(session: ReadSession, part: Slice) -> list[ColumnElement[bool]]:
    """Every class with traffic in the slice, by name: it says nothing new, but lets Postgres take the slow end of the
    index of each, and look at no request that is faster."""
    if part.traffic_class is not None:
        return []
    return [TraceRow.traffic_class.in_(overview.known(session, part)["classes"])]


def _conditions(session: ReadSession, part: Slice, chosen: Filter) -> list[ColumnElement[bool]]:
    wanted: list[ColumnElement[bool]] = [TraceRow.started_at >= part.since, TraceRow.started_at < part.until]
    for column, value in (
        (TraceRow.traffic_class, part.traffic_class),
        (TraceRow.arm, part.arm),
        (TraceRow.policy_version, part.version),
        (TraceRow.replica_id, part.replica),
        (TraceRow.status, chosen.status),
        (TraceRow.tenant, chosen.tenant),
        (TraceRow.assignment_key, chosen.conversation),
    ):
        if value is not None:
            wanted.append(column == value)
    if chosen.status not in (None, Status.OK):
        wanted.append(TraceRow.status != Status.OK)  # says nothing new, but lets Postgres take the index of failures
    if chosen.failed:
        wanted.append(TraceRow.status.in_((Status.ERROR, Status.TIMEOUT)))
        wanted.append(TraceRow.status != Status.OK)  # as above
    if chosen.min_e2e_s is not None:
        wanted += [TraceRow.e2e_s >= chosen.min_e2e_s, *_of_every_class(session, part)]
    if chosen.max_e2e_s is not None:
        wanted.append(TraceRow.e2e_s < chosen.max_e2e_s)
    if chosen.trace_ids is not None:
        wanted.append(TraceRow.trace_id.in_(chosen.trace_ids))
    return wanted
