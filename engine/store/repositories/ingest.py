"""Writing traces: a batch is one transaction under a key, so that writing it again is known and skipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast
from uuid import UUID

import psycopg
from sqlalchemy import Table
from sqlalchemy.dialects.postgresql import insert

from engine.store.database import WriteSession
from engine.store.models import RollupDeltaHistogramRow, RollupDeltaRow, TraceBatchRow, TracePayloadRow, TraceRow

TRACE_COLUMNS = tuple(c.name for c in TraceRow.__table__.columns if c.name != "written_at")  # Postgres' own
PAYLOAD_COLUMNS = tuple(c.name for c in TracePayloadRow.__table__.columns)


def claim(session: WriteSession, writer_id: UUID, seq: int, records: int) -> bool:
    """Take the key of a batch; False when a batch was written under it already."""
    taken = session.execute(
        insert(TraceBatchRow)
        .values(writer_id=writer_id, seq=seq, records=records)
        .on_conflict_do_nothing()
        .returning(TraceBatchRow.seq)
    )
    return taken.first() is not None


def copy_traces(session: WriteSession, rows: Iterable[Sequence[Any]]) -> None:
    """COPY rows of ``TRACE_COLUMNS`` into traces."""
    _copy(session, "traces", TRACE_COLUMNS, rows)


def copy_payloads(session: WriteSession, rows: Iterable[Sequence[Any]]) -> None:
    """COPY rows of ``PAYLOAD_COLUMNS`` into trace_payloads."""
    _copy(session, "trace_payloads", PAYLOAD_COLUMNS, rows)


def add_rollups(
    session: WriteSession, sums: Sequence[Mapping[str, Any]], histograms: Sequence[Mapping[str, Any]]
) -> None:
    """Insert the deltas of one batch; readers sum rows of equal key."""
    if sums:
        session.execute(insert(cast(Table, RollupDeltaRow.__table__)), list(sums))
    if histograms:
        session.execute(insert(cast(Table, RollupDeltaHistogramRow.__table__)), list(histograms))


def _copy(session: WriteSession, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    connection = cast(psycopg.Connection[Any], session.connection().connection.driver_connection)
    statement = f"COPY {table} ({', '.join(columns)}) FROM STDIN"
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row(row)
