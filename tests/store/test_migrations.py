"""The migrations make exactly what the models say, and can be taken back, on a real server."""

from __future__ import annotations

from datetime import date

import psycopg
from alembic import command

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
        assert partitions.drop_before(session, "traces", days[2]) == days[:2]
    with db.read() as session:
        left = {(table, day) for table, day, _ in partitions.existing(session)}
    assert left == {("traces", days[2]), *(("trace_payloads", day) for day in days)}
