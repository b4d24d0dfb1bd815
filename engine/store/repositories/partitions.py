"""Daily partitions of the trace tables: made ahead, dropped when their time is over."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import text

from engine.store.database import ReadSession, WriteSession

PARTITIONED = ("traces", "trace_payloads")
PARTITION_NAME = re.compile(r"^(traces|trace_payloads)_p(\d{8})$")
_DDL_LOCK = 0x51195_0002  # two writers that meet the same new day wait for each other instead of failing


def ensure(session: WriteSession, day: date) -> None:
    """Make the partitions of one UTC day if they are not there."""
    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _DDL_LOCK})
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    end = start + timedelta(days=1)
    for table in PARTITIONED:
        session.execute(
            text(
                f"CREATE TABLE IF NOT EXISTS {table}_p{day:%Y%m%d} PARTITION OF {table} "
                f"FOR VALUES FROM ('{start.isoformat()}') TO ('{end.isoformat()}')"
            )
        )


def existing(session: ReadSession | WriteSession) -> list[tuple[str, date, int]]:
    """(table, day, bytes) of every partition, oldest first."""
    rows = session.execute(
        text(
            "SELECT child.relname, pg_total_relation_size(child.oid) FROM pg_inherits "
            "JOIN pg_class child ON child.oid = inhrelid JOIN pg_class parent ON parent.oid = inhparent "
            "WHERE parent.relname = ANY(:tables) AND parent.relkind = 'p' AND child.relkind = 'r'"
        ),
        {"tables": list(PARTITIONED)},
    )
    found = []
    for name, size in rows:
        if match := PARTITION_NAME.match(name):
            found.append((match[1], datetime.strptime(match[2], "%Y%m%d").replace(tzinfo=UTC).date(), int(size)))
    return sorted(found, key=lambda item: (item[1], item[0]))


def drop_before(session: WriteSession, table: str, day: date) -> list[date]:
    """Drop the partitions of ``table`` that end before ``day``; says which."""
    gone = [d for t, d, _ in existing(session) if t == table and d < day]
    for old in gone:
        session.execute(text(f"DROP TABLE {table}_p{old:%Y%m%d}"))
    return gone
