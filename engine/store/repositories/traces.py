"""Single traces: a filtered list by pages, and one with its tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime
from operator import ge, gt, lt
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Float, and_, cast, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute

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
ORDERS = {"newest": TraceRow.started_at, "slowest": TraceRow.e2e_s}
"""What a list is sorted by, descending; equal ones by their id."""
LATENCIES = {"e2e": TraceRow.e2e_s, "ttft": TraceRow.ttft_s, "tpot": TraceRow.tpot_s, "queue": TraceRow.queue_s}
FAILED = (Status.ERROR, Status.TIMEOUT)
COUNTED = 100_000
"""Matches of a filter that rollups do not know are counted to here and not further."""


@dataclass(frozen=True, slots=True)
class Filter:
    """What of a slice is listed; None means all.

    ``conversation`` is the assignment key; ``min_s`` and ``max_s`` bound the ``latency`` named, in seconds,
    ``min_length`` and ``max_length`` the acceptance length, ``min_output`` the output tokens; ``failed`` are the
    requests that ended in an error or a timeout.
    """

    status: str | None = None
    tenant: str | None = None
    conversation: str | None = None
    latency: str = "e2e"
    min_s: float | None = None
    max_s: float | None = None
    min_length: float | None = None
    max_length: float | None = None
    min_output: int | None = None
    replica: str | None = None
    generation: int | None = None
    finish_reason: str | None = None
    retried: bool = False
    preempted: bool = False
    trace_ids: tuple[UUID, ...] | None = None
    failed: bool = False

    @property
    def is_empty(self) -> bool:
        return self == Filter()


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a list, by its key: behind the row whose ``value`` the list is sorted by, or before it (``back``).

    However deep it lies, a page from here costs what its own rows cost. ``passed`` rows come before the page.
    """

    value: datetime | float
    trace_id: UUID
    passed: int
    back: bool = False


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
    place: Place | None = None,
) -> list[dict[str, Any]]:
    """One page of the traces of a slice, sorted and cut by the server; the first one without a ``place``."""
    key, back = ORDERS[order], place is not None and place.back
    query = select(*LISTED).where(*_conditions(session, part, chosen), *_beyond(key, place)).limit(limit)
    if back:
        rows = session.execute(query.order_by(key.asc(), TraceRow.trace_id.desc())).mappings().all()
        return [dict(row) for row in reversed(rows)]
    query = query.order_by(key.desc(), TraceRow.trace_id.asc())
    many = limit + (place.passed if place is not None else 0)
    if order == "slowest" and chosen.is_empty and (least := _slow_from(session, part, many)) is not None:
        slow = query.where(TraceRow.e2e_s >= least, *_of_every_class(session, part))
        rows = session.execute(slow).mappings().all()
        if len(rows) == limit:
            return [dict(row) for row in rows]
    return [dict(row) for row in session.execute(query).mappings()]


def matching(session: ReadSession, part: Slice, chosen: Filter) -> tuple[int, bool]:
    """How many traces match, and whether that is all of them: from the rollups where they know, else up to COUNTED."""
    if chosen.is_empty:
        return _all_in(session, overview.with_traces(session, part)), True
    some = select(TraceRow.trace_id).where(*_conditions(session, part, chosen)).limit(COUNTED).subquery()
    found = session.scalar(select(func.count()).select_from(some)) or 0
    return found, found < COUNTED


def _all_in(session: ReadSession, part: Slice) -> int:
    """How many traces a slice has: whole minutes by the rollups, what is left at its ends by the traces themselves."""
    whole, ends = part.by_minutes()
    rows = overview.sums(session, whole) if whole is not None else []
    counted = rows[0]["requests"] if rows else 0
    for end in ends:
        some = select(func.count()).select_from(TraceRow).where(*_conditions(session, end, Filter()))
        counted += session.scalar(some) or 0
    return counted


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
    # A rollup lies at the start of its minute, which may be before the slice begins.
    whole = replace(part, since=part.since.replace(second=0, microsecond=0))
    return [TraceRow.traffic_class.in_(overview.known(session, whole)["classes"])]


def _beyond(key: InstrumentedAttribute[Any], place: Place | None) -> list[ColumnElement[bool]]:
    """Rows behind a place, or before it. The first condition says nothing new, but an index can be read from it on."""
    if place is None:
        return []
    if place.back:
        tied = and_(key == place.value, TraceRow.trace_id < place.trace_id)
        return [key >= place.value, or_(key > place.value, tied)]
    tied = and_(key == place.value, TraceRow.trace_id > place.trace_id)
    return [key <= place.value, or_(key < place.value, tied)]


def _ended(statuses: Collection[Status]) -> list[ColumnElement[bool]]:
    """Requests that ended in one of these, told by the ways they did not end.

    Only "not ok" lets Postgres take the index of failures. Beside an equality it would be counted twice: the planner
    would expect one failure a day, and read those of the whole month instead of the newest.
    """
    return [TraceRow.status != status for status in Status if status not in statuses]


def _conditions(session: ReadSession, part: Slice, chosen: Filter) -> list[ColumnElement[bool]]:
    wanted: list[ColumnElement[bool]] = [TraceRow.started_at >= part.since, TraceRow.started_at < part.until]
    for column, value in (
        (TraceRow.traffic_class, part.traffic_class),
        (TraceRow.arm, part.arm),
        (TraceRow.policy_version, part.version),
        (TraceRow.replica_id, part.replica),
        (TraceRow.tenant, chosen.tenant),
        (TraceRow.assignment_key, chosen.conversation),
        (TraceRow.replica_id, chosen.replica),
        (TraceRow.generation, chosen.generation),
        (TraceRow.finish_reason, chosen.finish_reason),
    ):
        if value is not None:
            wanted.append(column == value)
    if part.versions is not None:
        wanted.append(TraceRow.policy_version.in_(part.versions))
    wanted += _ended(FAILED) if chosen.failed else []
    wanted += _ended((Status(chosen.status),)) if chosen.status is not None else []
    latency = LATENCIES[chosen.latency]
    length = 1 + cast(TraceRow.accepted, Float) / func.nullif(TraceRow.steps, 0)
    wanted += [
        compare(column, value)
        for column, compare, value in (
            (latency, ge, chosen.min_s),
            (latency, lt, chosen.max_s),
            (length, ge, chosen.min_length),
            (length, lt, chosen.max_length),
            (TraceRow.output_tokens, ge, chosen.min_output),
            (TraceRow.retry, gt, 0 if chosen.retried else None),
            (TraceRow.preemptions, gt, 0 if chosen.preempted else None),
        )
        if value is not None
    ]
    if chosen.latency == "e2e" and chosen.min_s is not None:
        wanted += _of_every_class(session, part)
    if chosen.trace_ids is not None:
        wanted.append(TraceRow.trace_id.in_(chosen.trace_ids))
    return wanted
