"""Upkeep of the trace store: partitions made ahead and dropped in time, rollups compacted and rebuilt."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta

from sqlalchemy.exc import DBAPIError

from engine.settings import TelemetrySettings
from engine.store.database import Database
from engine.store.repositories import correctness, drift, partitions, rollups, shadow

DAYS_AHEAD = 3
CLOSED_AFTER = timedelta(seconds=75)
"""A minute is compacted this long after its start: most of its traces are there then, and late ones are added alike."""
log = logging.getLogger(__name__)


def keep_partitions(database: Database, settings: TelemetrySettings, now: datetime) -> bool:
    """Make the partitions of the coming days and drop those past their retention.

    One that is in use waits for the next round, and so do the others of its table: each try keeps every new request
    waiting for up to a second. There is never more to do at once.
    """
    with database.write() as session:
        for ahead in range(DAYS_AHEAD + 1):
            partitions.ensure(session, (now + timedelta(days=ahead)).date())
        # Before the minutes, and whole days as they go: where ten minutes are kept, readers take minutes to be kept.
        oldest = (now - timedelta(days=settings.retention_days)).astimezone(UTC)
        rollups.forget(session, "ten_minutes", oldest.replace(hour=0, minute=0, second=0, microsecond=0))
    kept = {
        "traces": settings.retention_days,
        "trace_payloads": settings.payload_retention_days,
        "rollups_minute": settings.retention_days,
        "rollup_histograms_minute": settings.retention_days,
    }
    with database.read() as session:
        there = partitions.existing(session)
    busy: set[str] = set()
    for table, day, _ in there:
        if table in busy or day >= (now - timedelta(days=kept[table])).date():
            continue
        if not _drop(database, table, day, kept[table]):
            busy.add(table)
    with database.write() as session:
        old = now - timedelta(days=settings.rollup_retention_days)
        for tier in ("hour", "day"):
            rollups.forget(session, tier, old)
        drift.forget(session, old)
        correctness.forget(session, old)
        rollups.forget_batches(session, now - timedelta(days=settings.retention_days))
        shadow.forget(session, now - timedelta(days=settings.retention_days))
    return False


def _drop(database: Database, table: str, day: date, days: int) -> bool:
    """Each in a transaction of its own, so that one that is being read keeps no other."""
    try:
        with database.write() as session:
            partitions.drop(session, table, day)
    except DBAPIError as error:
        log.warning("the partition of %s for %s is in use and will be dropped later: %s", table, day, error.orig)
        return False
    log.info("dropped the partition of %s for %s: older than %d days", table, day, days)
    return True


def compact(database: Database, now: datetime) -> bool:
    """Merge a piece of the closed minutes, the oldest first; whether more of them wait."""
    try:
        with database.write() as session:
            return rollups.compact(session, now - CLOSED_AFTER)
    except rollups.Busy:
        log.info("the rollups are being rebuilt; compaction waits")
    return False


def rebuild(
    database: Database, settings: TelemetrySettings, since: date | None, until: date | None, say: Callable[[str], None]
) -> int:
    """Make the rollups of [since, until] again from the traces that are kept; how many traces they count now.

    A day without a partition of traces is left alone: its rollups are all that is known of it.
    """
    with database.read() as session:
        days = [day for table, day, _ in partitions.existing(session) if table == "traces"]
    wanted = [day for day in days if (since is None or day >= since) and (until is None or day <= until)]
    wanted = [day for day in wanted if day <= datetime.now(UTC).date()]
    total = 0
    for day in wanted:
        with rollups.turn(database), database.snapshot() as session:
            found = rollups.rebuild(session, day, settings.objectives)
        total += found
        if found:
            say(f"{day}: {found:,} traces")
    return total
