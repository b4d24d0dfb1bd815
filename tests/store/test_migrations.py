"""The migrations make exactly what the models say, and can be taken back, on a real server."""

from __future__ import annotations

from datetime import UTC, date, datetime

import psycopg
from alembic import command
from sqlalchemy import text

from engine.ops import upkeep
from engine.settings import TelemetrySettings
from engine.store import migrate
from engine.store.database import Database, libpq_url
from engine.store.repositories import partitions


def tables(url: str) -> set[str]:
    with psycopg.connect(libpq_url(url)) as connection:
        rows = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    return {name for (name,) in rows}


def test_up_check_down_and_up_again(database_url: str) -> None:
    config = migrate.alembic_config(database_url)
    command.upgrade(config, "head")
    command.check(config)
    database = Database(database_url)
    with database.write() as session:
        partitions.ensure(session, date(2026, 1, 1))
    command.check(config)  # partitions are data, not schema
    database.close()
    command.downgrade(config, "base")
    assert tables(database_url) <= {"alembic_version"}
    command.upgrade(config, "head")
    assert {"traces", "serving_plans", "policy_versions"} <= tables(database_url)


def test_old_partitions_are_dropped_and_young_ones_kept(db: Database) -> None:
    days = [date(2026, 1, day) for day in (1, 2, 3)]
    with db.write() as session:
        for day in days:
            partitions.ensure(session, day)
            partitions.ensure(session, day)  # twice is once
    settings = TelemetrySettings(retention_days=1, payload_retention_days=2)
    assert not upkeep.keep_partitions(db, settings, datetime(2026, 1, 4, 12, tzinfo=UTC))
    with db.read() as session:
        left = {(table, day) for table, day, _ in partitions.existing(session) if day <= days[-1]}
    kept = {(table, days[2]) for table in partitions.PARTITIONED}
    assert left == kept | {("trace_payloads", days[1])}


def test_a_partition_in_use_is_dropped_later_and_holds_up_nobody(db: Database) -> None:
    day = date(2026, 1, 1)
    now = datetime(2026, 3, 1, tzinfo=UTC)
    with db.write() as session:
        partitions.ensure(session, day)
    with db.read() as reader:
        reader.execute(text("SELECT count(*) FROM traces"))
        assert upkeep.keep_partitions(db, TelemetrySettings(), now), "there is more to do"
        with db.read() as session:
            assert ("traces", day) in {(table, d) for table, d, _ in partitions.existing(session)}
            assert ("rollups_minute", day) not in {(table, d) for table, d, _ in partitions.existing(session)}
    assert not upkeep.keep_partitions(db, TelemetrySettings(), now)
    with db.read() as session:
        assert day not in {d for _, d, _ in partitions.existing(session)}
