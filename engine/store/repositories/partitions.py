"""Daily partitions of the trace tables: made ahead, dropped when their time is over."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import text

from engine.store import locks
from engine.store.database import ReadSession, WriteSession

PARTITIONED = ("traces", "trace_payloads", "rollups_minute", "rollup_histograms_minute")
PARTITION_NAME = re.compile(rf"^({'|'.join(PARTITIONED)})_p(\d{{8}})$")


def ensure(session: WriteSession, day: date) -> None:
    """Make the partitions of one UTC day if they are not there; no lock is taken where they are.

    Each is made beside its table and then attached, which waits for no reader and no writer.
    """
    if not _missing(session, day):
        return
    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": locks.PARTITIONS})
    for table in _missing(session, day):
        session.execute(text(create_beside(table, name(table, day))))
        session.execute(text(attach(table, day)))


def name(table: str, day: date) -> str:
    """What the partition of a UTC day is called."""
    return f"{table}_p{day:%Y%m%d}"


def create_beside(table: str, new: str) -> str:
    """SQL: a table like a partitioned one, without its indexes."""
    return f"CREATE TABLE {new} (LIKE {table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS)"


def attach(table: str, day: date) -> str:
    """SQL: make the table that has the name of a day's partition that partition; its indexes are built by it."""
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    bounds = f"FROM ('{start.isoformat()}') TO ('{(start + timedelta(days=1)).isoformat()}')"
    return f"ALTER TABLE {table} ATTACH PARTITION {name(table, day)} FOR VALUES {bounds}"


def is_there(session: WriteSession, table: str, day: date) -> bool:
    return table not in _missing(session, day)


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
    for relation, size in rows:
        if (match := PARTITION_NAME.match(relation)) and size is not None:  # None: it is being dropped
            found.append((match[1], datetime.strptime(match[2], "%Y%m%d").replace(tzinfo=UTC).date(), int(size)))
    return sorted(found, key=lambda item: (item[1], item[0]))


def drop(session: WriteSession, table: str, day: date, lock_timeout_ms: int = 1_000) -> None:
    """Drop one partition of ``table``.

    It needs the whole table for a moment. A reader that does not let go of it would make every request behind the drop
    wait as well, so the drop gives up (``OperationalError``) after ``lock_timeout_ms`` and is tried again later.
    """
    if table not in PARTITIONED:
        raise ValueError(f"{table} has no partitions; {', '.join(PARTITIONED)} have")
    session.execute(text(f"SET LOCAL lock_timeout = {int(lock_timeout_ms)}"))
    session.execute(text(f"DROP TABLE IF EXISTS {name(table, day)}"))


def _missing(session: WriteSession, day: date) -> list[str]:
    query = text("SELECT t FROM unnest(CAST(:tables AS text[])) AS x (t) WHERE to_regclass(t || :suffix) IS NULL")
    return list(session.scalars(query, {"tables": list(PARTITIONED), "suffix": f"_p{day:%Y%m%d}"}))
