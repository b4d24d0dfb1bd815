"""The migrations make exactly what the models say, and can be taken back, on a real server."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from alembic import command
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from engine.ops import housekeeping, upkeep
from engine.settings import TelemetrySettings
from engine.store import migrate
from engine.store.connection import libpq_url
from engine.store.database import Database, WriteSession
from engine.store.repositories import audit, ingest, partitions
from tests.store.test_rollups import records, write


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
    upkeep.keep_partitions(db, settings, datetime(2026, 1, 4, 12, tzinfo=UTC))
    with db.read() as session:
        left = {(table, day) for table, day, _ in partitions.existing(session) if day <= days[-1]}
    kept = {(table, days[2]) for table in partitions.PARTITIONED}
    assert left == kept | {("trace_payloads", days[1])}


def test_a_partition_in_use_is_tried_again_minutes_later(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    days = [date(2026, 1, 1), date(2026, 1, 2)]
    now = datetime(2026, 3, 1, tzinfo=UTC)
    with db.write() as session:
        for day in days:
            partitions.ensure(session, day)
    tried: list[tuple[str, date]] = []
    drop = partitions.drop

    def counted(session: WriteSession, table: str, day: date) -> None:
        tried.append((table, day))
        drop(session, table, day)

    monkeypatch.setattr(partitions, "drop", counted)
    chore = next(c for c in housekeeping.of_store(TelemetrySettings(), db, lambda: now) if c.name == "partitions")
    with db.read() as reader:
        reader.execute(text("SELECT count(*) FROM traces"))
        for second in (0.0, 0.5, 299.0):
            housekeeping.attend(chore, second)
        assert [day for table, day in tried if table == "traces"] == days[:1], "one try a round keeps requests waiting"
        with db.read() as session:
            left = {(table, day) for table, day, _ in partitions.existing(session) if day in days}
        assert left == {("traces", day) for day in days}
    housekeeping.attend(chore, 300.0)
    with db.read() as session:
        assert not {day for _, day, _ in partitions.existing(session)} & set(days)


def test_hours_outlive_their_minutes_in_the_upgrade_to_more_tiers(database_url: str) -> None:
    """Of the hour a hundred days ago nothing finer is left: it must come through, and be in its day."""
    config = migrate.alembic_config(database_url)
    command.downgrade(config, "0004")
    old, young = datetime(2025, 11, 20, 7, tzinfo=UTC), datetime(2026, 3, 1, 9, tzinfo=UTC)
    counted = ("requests", "errors", "cancelled", "retries", "preemptions", "good", "prompt_tokens", "output_tokens")
    names = [*counted, "steps", "drafted", "accepted"]
    key = "at, policy_version, arm, traffic_class, replica_id"
    sums = f"{', '.join(names)}, drafted_per_pos, accepted_per_pos, draft_s, verify_s, decode_s"
    database = Database(database_url)
    with database.write() as session:
        partitions.ensure(session, young.date())
        for tier, at, n in (
            ("hour", old, 40),
            ("hour", old + timedelta(hours=2), 2),
            ("hour", young, 9),
            ("minute", young + timedelta(minutes=3), 5),
            ("minute", young + timedelta(minutes=8), 4),
        ):
            more, value = (", generation", ", 1") if tier == "minute" else ("", "")
            values = f":at, 1, 'champion', 'chat', 'r'{value}"
            session.execute(
                text(
                    f"INSERT INTO rollups_{tier} ({key}{more}, {sums}) "
                    f"VALUES ({values}, {', '.join([':n'] * len(names))}, ARRAY[:n, 1], ARRAY[:n], 1, 1, 1)"
                ),
                {"at": at, "n": n},
            )
            session.execute(
                text(
                    f"INSERT INTO rollup_histograms_{tier} (metric, {key}{more}, idx, cnt) "
                    f"VALUES ('e2e', {values}, ARRAY[-3, 7], ARRAY[1, :n])"
                ),
                {"at": at, "n": n},
            )
    command.upgrade(config, "0005")
    midnight = old.replace(hour=0)
    with database.read() as session:
        for tier, expected in {
            "minute": [(young + timedelta(minutes=3), 5, [5, 1]), (young + timedelta(minutes=8), 4, [4, 1])],
            "ten_minutes": [(young, 9, [9, 2])],
            "hour": [(old, 40, [40, 1]), (old + timedelta(hours=2), 2, [2, 1]), (young, 9, [9, 1])],
            "day": [(midnight, 42, [42, 2]), (young.replace(hour=0), 9, [9, 1])],
        }.items():
            found = session.execute(text(f"SELECT at, requests, drafted_per_pos FROM rollups_{tier} ORDER BY at")).all()
            assert [tuple(row) for row in found] == expected, tier
        days = session.execute(text("SELECT at, idx, cnt FROM rollup_histograms_day ORDER BY at")).all()
        assert [tuple(row) for row in days] == [
            (midnight, [-3, 7], [2, 42]),
            (young.replace(hour=0), [-3, 7], [1, 9]),
        ]
        assert session.scalar(text("SELECT count(*) FROM rollup_deltas")) == 0
    database.close()
    command.upgrade(config, "head")
    command.check(config)


LATER = {
    *("other_s", "cost_s", "plain_s", "expected_accepted", "draft_errors"),
    *("expected_plain_s", "expected_cost_s"),
}
"""Columns that the first engines did not know."""
LATER_IN_ROLLUPS = LATER | {"e2e_s"}


@pytest.fixture
def engine_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer names only the columns of the first schema, in its COPY and in its deltas."""
    add = ingest.add_rollups

    def without(session: WriteSession, sums: Any, histograms: Any) -> None:
        add(session, [{k: v for k, v in row.items() if k not in LATER_IN_ROLLUPS} for row in sums], histograms)

    monkeypatch.setattr(ingest, "TRACE_COLUMNS", tuple(c for c in ingest.TRACE_COLUMNS if c not in LATER))
    monkeypatch.setattr(ingest, "add_rollups", without)


@pytest.mark.usefixtures("engine_of_before")
def test_an_engine_of_before_writes_into_the_newest_schema(db: Database, tmp_path: Path) -> None:
    write(db, tmp_path, records()[:5])
    with db.read() as session:
        assert audit.traces(session) == 5
        assert session.scalar(text("SELECT max(draft_errors) FROM traces")) == 0
        assert session.scalar(text("SELECT min(e2e_s) FROM rollup_deltas")) == pytest.approx(np.nan, nan_ok=True)


@pytest.mark.usefixtures("engine_of_before")
@pytest.mark.parametrize(("table", "column"), [("traces", "draft_errors"), ("rollup_deltas", "cost_s")])
def test_without_a_default_its_traces_are_refused(db: Database, tmp_path: Path, table: str, column: str) -> None:
    with db.write() as session:
        session.execute(text(f"ALTER TABLE {table} ALTER COLUMN {column} DROP DEFAULT"))
    with pytest.raises((DBAPIError, psycopg.Error), match=column):
        write(db, tmp_path, records()[:5])


def test_what_running_rollouts_counted_by_steps_is_counted_anew(database_url: str) -> None:
    config = migrate.alembic_config(database_url)
    command.upgrade(config, "head")
    command.downgrade(config, "0021")
    with psycopg.connect(libpq_url(database_url)) as connection:
        connection.execute('INSERT INTO comparisons VALUES (7, \'{"7": []}\', \'[{"arm": "canary", "y": 90}]\')')
        connection.execute("INSERT INTO compared_keys VALUES (7, 1, 'canary', 'chat', 1, 0, 0, 0, 0, 0, 120, 90, '{}')")
    command.upgrade(config, "head")
    with psycopg.connect(libpq_url(database_url)) as connection:
        for table in ("comparisons", "compared_keys"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
