"""Writing traces: a batch is one transaction under a key, so that writing it again is known and skipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast
from uuid import UUID

import psycopg

from engine.store.database import WriteSession
from engine.store.models import TracePayloadRow, TraceRow

TRACE_COLUMNS = tuple(c.name for c in TraceRow.__table__.columns if c.name != "written_at")  # Postgres' own
PAYLOAD_COLUMNS = tuple(c.name for c in TracePayloadRow.__table__.columns)


def claim(session: WriteSession, writer_id: UUID, seq: int, records: int) -> bool:
    """Take the key of a batch; False when a batch was written under it already."""
    taken = session.change(
        "INSERT INTO trace_batches (writer_id, seq, records) VALUES (%(writer_id)s, %(seq)s, %(records)s) "
        "ON CONFLICT DO NOTHING RETURNING seq",
        writer_id=writer_id,
        seq=seq,
        records=records,
    )
    return bool(taken)


def copy_traces(session: WriteSession, rows: Iterable[Sequence[Any]]) -> None:
    """COPY rows of ``TRACE_COLUMNS`` into traces."""
    _copy(session, "traces", TRACE_COLUMNS, rows)


def copy_payloads(session: WriteSession, rows: Iterable[Sequence[Any]]) -> None:
    """COPY rows of ``PAYLOAD_COLUMNS`` into trace_payloads."""
    _copy(session, "trace_payloads", PAYLOAD_COLUMNS, rows)


def add_rollups(
    session: WriteSession, sums: Sequence[Mapping[str, Any]], histograms: Sequence[Mapping[str, Any]]
) -> None:
    """COPY the deltas of one batch, rows of equal columns; readers sum rows of equal key."""
    for table, rows in (("rollup_deltas", sums), ("rollup_delta_histograms", histograms)):
        if rows:
            _copy(session, table, tuple(rows[0]), (tuple(row.values()) for row in rows))


def _copy(session: WriteSession, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Arrays are of integers, and written out here: psycopg looks at each element for what it might be, and a prompt
    has hundreds."""
    connection = cast(psycopg.Connection[Any], session.connection().connection.driver_connection)
    statement = f"COPY {table} ({', '.join(columns)}) FROM STDIN"
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row([_array(value) if isinstance(value, (list, tuple)) else value for value in row])


def _array(values: Sequence[int]) -> str:
    """As Postgres writes an array."""
    return f"{{{','.join(map(str, values))}}}"
