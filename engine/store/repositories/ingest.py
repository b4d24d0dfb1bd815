"""Writing traces: a batch is one statement under a key, so that writing it again is known and skipped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, LiteralString
from uuid import UUID

from engine.store.connection import Writes
from engine.store.models import RollupDeltaHistogramRow, RollupDeltaRow, TracePayloadRow, TraceRow

Row = Mapping[str, Any]
TABLES: dict[str, tuple[str, ...]] = {
    model.__tablename__: tuple(c.name for c in model.__table__.columns if c.name != "written_at")  # Postgres' own
    for model in (TraceRow, TracePayloadRow, RollupDeltaRow, RollupDeltaHistogramRow)
}
"""What a batch is written to, and the columns that are written."""
_ENCODE = json.JSONEncoder(default=str, allow_nan=False, check_circular=False).encode


def add(to: Writes, writer_id: UUID, seq: int, records: int, rows: Mapping[str, Sequence[Row]]) -> bool:
    """Add the rows of a batch, by the table's name; False, and nothing is added, when its key was taken already.

    One statement, hence one round trip: at a few requests a second what a batch costs is how often the writer and the
    server wake each other beside the engine's threads, not its rows. ValueError for a number that is not finite.
    """
    written = {table: _ENCODE(rows.get(table, ())) for table in TABLES}
    statement = _statement(tuple(TABLES.items()))
    return bool(to.change(statement, writer_id=writer_id, seq=seq, records=records, **written))


@cache
def _statement(tables: tuple[tuple[str, tuple[str, ...]], ...]) -> LiteralString:
    """Only where the key is claimed are there rows to insert."""
    parts = [
        "claimed AS (INSERT INTO trace_batches (writer_id, seq, records) "
        "VALUES (%(writer_id)s, %(seq)s, %(records)s) ON CONFLICT DO NOTHING RETURNING 1)"
    ]
    for table, columns in tables:
        selected = ", ".join(f"r.{column}" for column in columns)
        parts.append(
            f"{table}_added AS (INSERT INTO {table} ({', '.join(columns)}) SELECT {selected} "
            f"FROM claimed, json_populate_recordset(NULL::{table}, %({table})s) r)"
        )
    return f"WITH {', '.join(parts)} SELECT 1 FROM claimed"
