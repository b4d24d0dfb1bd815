"""The store and its parts about themselves: writers, spill, drops, exporter, partitions, rollups, learning."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from engine.store.database import ReadSession
from engine.store.panels.traffic import Rows
from engine.store.repositories import export, learning, notifications, partitions, plans, replicas, rollups
from engine.store.repositories.export import Cursor
from engine.store.repositories.overview import Slice

SEEN = timedelta(minutes=10)
"""Replicas are shown this long after their last heartbeat."""
TRACES = "mlflow"
EXPORTERS = {TRACES: "traces", "mlflow-serving": "metrics of serving versions", "mlflow-registry": "runs and versions"}
"""Cursors of ``engine.ops`` and ``engine.registry``, and what they send."""


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
                "error": writer.get("error") or replica.stats.get("findings", {}).get("error"),
                "rss_bytes": replica.stats.get("peak_rss_bytes"),
            }
        )
    return rows


def exporter(session: ReadSession, part: Slice) -> Rows:
    """What goes to MLflow, one row each: how far the traces are and what waits of them; the metrics of versions that
    serve; runs and versions. Nothing of what has never run."""
    return [
        _exporter(session, at, what)
        for name, what in EXPORTERS.items()
        if (at := export.cursor(session, name)) != Cursor(name)
    ]


def _exporter(session: ReadSession, at: Cursor, what: str) -> dict[str, object]:
    lag = export.lag(session, at) if at.name == TRACES else {"waiting": None, "oldest": None}
    age = None if lag["waiting"] is None else 0.0
    if lag["oldest"] is not None:
        age = (datetime.now(UTC) - lag["oldest"]).total_seconds()
    counts = {"exported": at.exported, "skipped": at.skipped, "refused": at.refused}
    late = export.cursors(session, f"{at.name}/")  # each of a part that is behind, with a trouble of its own
    said = [at.error, *(f"{one.name.removeprefix(f'{at.name}/')}: {one.error}" for one in late if one.error)]
    error = "; ".join(filter(None, said)) or None
    return {"exporter": at.name, "what": what, **counts, "waiting": lag["waiting"], "lag_s": age, "error": error}


def sinks(session: ReadSession, part: Slice) -> Rows:
    """Who is told of transitions: the last decision each is through with, how often the next has failed, and why."""
    return [
        {"sink": s.sink, "decision": s.decision_id, "tries": s.tries, "next_at": s.next_at, "error": s.error}
        for s in notifications.standings(session)
    ]


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
