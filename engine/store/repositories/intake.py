"""What the learner has taken in: each trace once, under an ordinal, on one side of the split for ever.

Traces are read in the order they were written. How far they were looked through, taken in or passed over, is kept in
the transaction that takes in, so a learner that was killed goes on where the last one ended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Boolean,
    Select,
    Text,
    and_,
    cast,
    column,
    exists,
    func,
    or_,
    select,
    text,
    true,
    tuple_,
)
from sqlalchemy.dialects.postgresql import insert

from engine.contracts import Status
from engine.store import locks
from engine.store.database import ReadSession, WriteSession
from engine.store.models import LearningCursorRow, LearningIntakeRow, TenantSettingRow, TracePayloadRow, TraceRow
from engine.store.repositories.export import settled_before

Hash = Callable[[Sequence[int]], int]
Row = LearningIntakeRow


@dataclass(frozen=True, slots=True)
class TrainableTrace:
    """A finished response that may be learned from. ``max_tokens`` is the request's limit.

    ``position`` counts the traces of its class on its side of the split, oldest first.
    """

    ordinal: int
    trace_id: UUID
    started_at: datetime
    traffic_class: str
    position: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    max_tokens: int


def take_in(session: WriteSession, request_hash: Hash, held_out: Callable[[int], bool], limit: int) -> Sequence[Row]:
    """Give the next ``limit`` trainable traces their ordinals; fewer than ``limit`` means that there are no more now.

    ``request_hash`` of the prompt (64 bits, signed) decides by ``held_out`` on which side a trace lies, unless the same
    request has been seen before: then it goes where that one went, whatever the share has become.
    """
    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": locks.INTAKE})
    cursor, before = session.get(LearningCursorRow, True), settled_before(session)
    found = session.execute(_next(cursor, before, limit)).all()
    # The end of what was looked through: where it was cut off, else all there is, of which the rest is passed over.
    end = found[-1] if len(found) == limit else session.execute(_newest(cursor, before)).one_or_none()
    if end is not None:
        _move(session, end.written_at, end.trace_id)
    if not found:
        return ()
    last = session.scalar(select(func.max(Row.ordinal))) or 0
    hashes = [request_hash(row.prompt_ids) for row in found]
    seen = select(Row.request_hash, func.bool_or(Row.held_out)).where(Row.request_hash.in_(set(hashes)))
    sides: dict[int, bool] = dict(session.execute(seen.group_by(Row.request_hash)).all())
    groups = [
        (row.model, row.traffic_class, sides.setdefault(key, held_out(key)))
        for row, key in zip(found, hashes, strict=True)
    ]
    positions = _positions(session, set(groups))
    rows = []
    for ordinal, (trace, key, group) in enumerate(zip(found, hashes, groups, strict=True), start=last + 1):
        positions[group] = positions.get(group, 0) + 1
        rows.append(
            Row(
                ordinal=ordinal,
                trace_id=trace.trace_id,
                started_at=trace.started_at,
                written_at=trace.written_at,
                model=trace.model,
                tenant=trace.tenant,
                traffic_class=trace.traffic_class,
                request_hash=key,
                held_out=group[2],
                position=positions[group],
                max_tokens=trace.max_tokens,
            )
        )
    session.add_all(rows)
    session.flush()
    return rows


def last_ordinal(session: ReadSession | WriteSession, model: str) -> int:
    return session.scalar(select(func.max(Row.ordinal)).where(Row.model == model)) or 0


def count(session: ReadSession | WriteSession, model: str, after: int = 0, held_out: bool | None = None) -> int:
    """How many traces of ``model`` were taken in after an ordinal."""
    query = select(func.count()).select_from(Row).where(Row.model == model, Row.ordinal > after)
    if held_out is not None:
        query = query.where(Row.held_out == held_out)
    return session.scalar(query) or 0


def recent(session: ReadSession, model: str, held_out: bool, limit: int, after: int = 0) -> list[int]:
    """Ordinals of the newest ``limit`` usable traces of one side, ascending."""
    query = _usable(model, held_out).where(Row.ordinal > after).order_by(Row.ordinal.desc()).limit(limit)
    return sorted(session.scalars(query))


def classes(session: ReadSession, model: str, before: int) -> list[str]:
    """The traffic classes that have training traces older than an ordinal."""
    query = select(Row.traffic_class).where(Row.model == model, ~Row.held_out, Row.ordinal < before).distinct()
    return sorted(session.scalars(query))


def sample(session: ReadSession, model: str, traffic_class: str, before: int, limit: int) -> list[int]:
    """Ordinals of a uniform sample of a class's usable training traces older than an ordinal, ascending.

    The ``limit`` smallest trace ids: they are random, so this is a bottom-k sample (Cohen & Kaplan 2007), which new
    traces enter and old ones leave as in a reservoir, and which anybody can draw again.
    """
    query = _usable(model, False).where(Row.traffic_class == traffic_class, Row.ordinal < before)
    return sorted(session.scalars(query.order_by(Row.trace_id).limit(limit)))


def load(session: ReadSession, ordinals: Sequence[int], batch: int = 256) -> Iterator[TrainableTrace]:
    """The traces of these ordinals, streamed through a server-side cursor, ascending.

    One whose tokens are gone (retention, forgotten) is left out.
    """
    if not ordinals:
        return
    query = (
        select(
            Row.ordinal,
            Row.trace_id,
            Row.started_at,
            Row.traffic_class,
            Row.position,
            TracePayloadRow.prompt_ids,
            TracePayloadRow.output_ids,
            Row.max_tokens,
        )
        .join(TracePayloadRow, _payload())
        .where(Row.ordinal == func.any(list(ordinals)), Row.forgotten_at.is_(None))
        .order_by(Row.ordinal)
        .execution_options(stream_results=True, yield_per=batch)
    )
    for row in session.execute(query):
        yield TrainableTrace(*row)


def withdrawn(session: ReadSession | WriteSession, ordinals: Sequence[int]) -> int:
    """How many of these may not teach any more: forgotten, or of a tenant that has opted out."""
    query = select(func.count()).select_from(Row).where(Row.ordinal == func.any(list(ordinals)))
    return session.scalar(query.where(or_(Row.forgotten_at.is_not(None), ~_allowed(Row.tenant)))) or 0


def _next(cursor: LearningCursorRow | None, before: datetime, limit: int) -> Select[*tuple[Any, ...]]:
    query: Select[*tuple[Any, ...]] = (
        select(
            TraceRow.trace_id,
            TraceRow.started_at,
            TraceRow.written_at,
            TraceRow.model,
            TraceRow.tenant,
            TraceRow.traffic_class,
            TraceRow.max_tokens,
            TracePayloadRow.prompt_ids,
        )
        .join(
            TracePayloadRow,
            and_(TracePayloadRow.started_at == TraceRow.started_at, TracePayloadRow.trace_id == TraceRow.trace_id),
        )
        .where(
            TraceRow.written_at < before,
            TraceRow.trainable,
            TraceRow.status == Status.OK.value,
            TraceRow.output_tokens > 1,
            _allowed(TraceRow.tenant),
        )
        .order_by(TraceRow.written_at, TraceRow.trace_id)
        .limit(limit)
    )
    return query if cursor is None else query.where(*_after(cursor))


def _newest(cursor: LearningCursorRow | None, before: datetime) -> Select[Any, Any]:
    """The newest trace that is settled, whether it may teach or not."""
    query = select(TraceRow.written_at, TraceRow.trace_id).where(TraceRow.written_at < before)
    if cursor is not None:
        query = query.where(*_after(cursor))
    return query.order_by(TraceRow.written_at.desc(), TraceRow.trace_id.desc()).limit(1)


def _after(cursor: LearningCursorRow) -> tuple[Any, Any]:
    return (
        TraceRow.written_at >= cursor.written_at,  # the index condition; the pair below breaks ties
        tuple_(TraceRow.written_at, TraceRow.trace_id) > tuple_(cursor.written_at, cursor.trace_id),
    )


def _move(session: WriteSession, written_at: datetime, trace_id: UUID) -> None:
    place = {"written_at": written_at, "trace_id": trace_id}
    statement = insert(LearningCursorRow).values(one=True, **place)
    session.execute(statement.on_conflict_do_update(index_elements=["one"], set_=place))


def _positions(session: WriteSession, groups: Collection[tuple[str, str, bool]]) -> dict[tuple[str, str, bool], int]:
    """The last position of each (model, class, side): one row of the index each, however long the intake is."""
    models, names, sides = zip(*groups, strict=True)
    wanted = (
        func.unnest(cast(list(models), ARRAY(Text)), cast(list(names), ARRAY(Text)), cast(list(sides), ARRAY(Boolean)))
        .table_valued(column("model", Text), column("name", Text), column("side", Boolean))
        .render_derived()
    )
    newest = (
        select(Row.position)
        .where(Row.model == wanted.c.model, Row.traffic_class == wanted.c.name, Row.held_out == wanted.c.side)
        .order_by(Row.position.desc())
        .limit(1)
        .lateral()
    )
    query = select(wanted.c.model, wanted.c.name, wanted.c.side, newest.c.position).join(newest, true())
    return {(model, name, side): position for model, name, side, position in session.execute(query)}


def _usable(model: str, held_out: bool) -> Select[Any]:
    """Ordinals of traces that still have their tokens and whose tenant still allows it."""
    return select(Row.ordinal).where(
        Row.model == model,
        Row.held_out == held_out,
        Row.forgotten_at.is_(None),
        exists().where(_payload()),
        _allowed(Row.tenant),
    )


def _payload() -> Any:
    return and_(TracePayloadRow.started_at == Row.started_at, TracePayloadRow.trace_id == Row.trace_id)


def _allowed(tenant: Any) -> Any:
    return ~exists().where(TenantSettingRow.tenant == tenant, ~TenantSettingRow.train)
