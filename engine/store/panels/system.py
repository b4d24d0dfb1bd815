"""The store and its parts about themselves: writers, spill, drops, exporter, partitions, rollups, learning."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from engine.store.database import ReadSession
from engine.store.panels.traffic import Rows
from engine.store.repositories import export, learning, partitions, plans, replicas, rollups
from engine.store.repositories.overview import Slice

SEEN = timedelta(minutes=10)
"""Replicas are shown this long after their last heartbeat."""
EXPORTER = "mlflow"


def writers(session: ReadSession, part: Slice) -> Rows:
    """One row a replica: its heartbeat, the generation it routes by, and its trace writer's counts since its start."""
    now = datetime.now(UTC)
    newest = plans.latest(session)
    rows = []
    for replica in replicas.live(session, within=SEEN):
        writer = replica.stats.get("writer", {})
        rows.append(
            {
                "replica": replica.replica_id,
                "heartbeat_age_s": (now - replica.heartbeat_at).total_seconds(),
                "observed_generation": replica.observed_generation,
                "newest_generation": newest.generation if newest is not None else None,
                "queue": writer.get("queue"),
                "queue_max": writer.get("queue_max"),
                "written": (writer.get("written") or 0) + (writer.get("replayed") or 0),
                "spilled": writer.get("spilled"),
                "spill_files": writer.get("spill_files"),
                "spill_bytes": writer.get("spill_bytes"),
                "set_aside": writer.get("set_aside"),
                "dropped": writer.get("dropped"),
                "last_write": writer.get("last_write"),
                "error": writer.get("error"),
                "rss_bytes": replica.stats.get("peak_rss_bytes"),
            }
        )
    return rows


def exporter(session: ReadSession, part: Slice) -> Rows:
    """How far the exporter to MLflow is, and what waits for it; nothing where it has never run."""
    at = export.cursor(session, EXPORTER)
    if at.written_at is None and at.error is None:
        return []
    lag = export.lag(session, at)
    age = (datetime.now(UTC) - lag["oldest"]).total_seconds() if lag["oldest"] is not None else 0.0
    counts = {
        "exported": at.exported,
        "skipped": at.skipped,
        "refused": at.refused,
        "waiting": lag["waiting"],
        "lag_s": age,
    }
    return [{"exporter": at.name, **counts, "error": at.error}]


def stored(session: ReadSession, part: Slice) -> Rows:
    """Partitions a day: bytes of traces, payloads and rollups per minute."""
    days: dict[str, dict[str, object]] = {}
    for table, day, size in partitions.existing(session):
        row = days.setdefault(day.isoformat(), {"day": day.isoformat()})
        row[f"{table}_bytes"] = size
    return [days[day] for day in sorted(days)]


def compaction(session: ReadSession, part: Slice) -> Rows:
    """How many deltas wait for the compactor, and how old the oldest is."""
    found = rollups.freshness(session)
    age = (datetime.now(UTC) - found.oldest).total_seconds() if found.oldest is not None else 0.0
    return [{"deltas_waiting": found.waiting, "oldest_minute": found.oldest, "oldest_age_s": age}]


def learning_cost(session: ReadSession, part: Slice) -> Rows:
    """The learner's attempts in the window: outcome and CPU seconds."""
    return [
        {"at": a.finished_at, "outcome": a.outcome, "version": a.version, "cpu_s": a.cpu_s, "traces": a.train_traces}
        for a in learning.finished(session, part.since, part.until)
    ]
