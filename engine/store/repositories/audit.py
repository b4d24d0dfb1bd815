"""What a benchmark or a drill asks of the trace table afterwards: is everything there, once, and when was the last."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import func, select, text

from engine.contracts import Status
from engine.store.database import ReadSession
from engine.store.models import RollupDeltaRow, RollupMinuteRow, TraceRow
from engine.store.repositories.overview import Slice
from engine.store.repositories.rollups import TIERS


def traces(session: ReadSession) -> int:
    return session.scalar(select(func.count()).select_from(TraceRow)) or 0


def not_ok(session: ReadSession) -> int:
    """Traces that ended in anything but success."""
    return session.scalar(select(func.count()).where(TraceRow.status != Status.OK)) or 0


def times_stored(session: ReadSession, request_ids: Collection[str]) -> dict[str, int]:
    """How often each of these requests is in the table; one that is missing is absent here."""
    query = (
        select(TraceRow.request_id, func.count())
        .where(TraceRow.request_id.in_(request_ids))
        .group_by(TraceRow.request_id)
    )
    return dict(session.execute(query).all())


def missing(session: ReadSession, trace_ids: Collection[UUID]) -> int:
    """How many of these traces are not in the table."""
    query = """
        SELECT count(*) FROM unnest(CAST(:ids AS uuid[])) AS wanted (trace_id)
        WHERE NOT EXISTS (SELECT 1 FROM traces WHERE traces.trace_id = wanted.trace_id)"""
    return int(session.scalar(text(query), {"ids": list(trace_ids)}) or 0)


def doubled(session: ReadSession) -> int:
    """How many traces are in the table more often than once: the key alone keeps only equal starts apart."""
    return int(session.scalar(text("SELECT count(*) - count(DISTINCT trace_id) FROM traces")) or 0)


def rollup_differences(session: ReadSession) -> int:
    """Minutes and keys, of every tier, whose rollups and deltas do not sum to what the raw traces do."""
    return sum(
        int(session.scalar(text(_DIFFERENCES.format(tier=tier, start=_START.format(row.total_seconds())))) or 0)
        for tier, (row, _) in TIERS.items()
    )


def rolled_up(session: ReadSession) -> int:
    """Requests the rollups know of; equal to ``traces`` when nothing was lost or counted twice."""
    counted = (
        select(func.coalesce(func.sum(t.requests), 0)).scalar_subquery() for t in (RollupDeltaRow, RollupMinuteRow)
    )
    left, merged = session.execute(select(*counted)).one()
    return int(left + merged)


def raw_quantiles(session: ReadSession, part: Slice, metric: str, qs: Sequence[float]) -> list[float]:
    """Quantiles in seconds from the traces themselves, at the rank floor(q (n - 1)) that a histogram takes."""
    if metric not in ("ttft", "tpot", "e2e", "queue"):
        raise ValueError(f"no duration {metric!r}")
    of_class = "" if part.traffic_class is None else " AND traffic_class = :class"
    session.execute(text("SET LOCAL work_mem = '256MB'"))  # sorted in memory: the best that the raw traces can do
    source = f"FROM traces WHERE started_at >= :since AND started_at < :until AND status = 'ok'{of_class}"
    values = {"since": part.since, "until": part.until, "class": part.traffic_class}
    n = session.scalar(text(f"SELECT count({metric}_s) {source}"), values) or 0
    if n == 0:
        return [float("nan")] * len(qs)
    ranks = [(math.floor(q * (n - 1)) + 0.5) / n for q in qs]  # percentile_disc takes the value at rank ceil(f n)
    query = f"SELECT percentile_disc(CAST(:ranks AS float8[])) WITHIN GROUP (ORDER BY {metric}_s) {source}"
    return [float(value) for value in session.scalar(text(query), values | {"ranks": ranks})]


def last_start(session: ReadSession, generation: int, arm: str) -> datetime | None:
    """When the newest request was given to an arm under a generation."""
    return session.scalar(
        select(func.max(TraceRow.started_at)).where(TraceRow.generation == generation, TraceRow.arm == arm)
    )


@dataclass(frozen=True, slots=True)
class Tried:
    """What a version served: requests, when the first of them ended and the last began, those whose draft failed, and
    those that were given to it under generation ``since`` or a later one."""

    requests: int
    first_ended: datetime | None
    last_began: datetime | None
    failed_drafts: int
    since: int


def tried(session: ReadSession, version: int, since: int) -> Tried:
    query = """
        SELECT count(*), min(started_at + make_interval(secs => e2e_s)), max(started_at),
            count(*) FILTER (WHERE draft_errors > 0), count(*) FILTER (WHERE generation >= :since)
        FROM traces WHERE policy_version = :version"""
    return Tried(*session.execute(text(query), {"version": version, "since": since}).one())


def not_ok_saying(session: ReadSession, words: str) -> int:
    """Of the traces that did not end well, those whose error says these words."""
    query = "SELECT count(*) FROM traces WHERE status <> 'ok' AND position(:words IN error) > 0"
    return int(session.scalar(text(query), {"words": words}) or 0)


_START = "date_bin(interval '{0} s', at, timestamptz '2000-01-01 00:00:00Z') AS at"
_KEY = "at, policy_version, arm, traffic_class, replica_id"
_SUMMED = ("requests", "errors", "prompt_tokens", "output_tokens", "steps", "drafted", "accepted")
_OF_EACH = ", ".join(f"CAST(sum({name}) AS bigint) AS {name}" for name in _SUMMED)
_DIFFERENCES = f"""
    WITH raw AS (
        SELECT {{start}}, {_KEY[4:]}, count(*) AS requests,
            count(*) FILTER (WHERE status IN ('error', 'timeout')) AS errors,
            count(*) FILTER (WHERE status = 'ok') AS timed,
            {", ".join(f"sum({name}) AS {name}" for name in _SUMMED[2:])}
        FROM (SELECT started_at AS at, * FROM traces) AS t GROUP BY 1, 2, 3, 4, 5
    ), summed AS (
        SELECT {_KEY}, {_OF_EACH} FROM (
            SELECT {_KEY}, {", ".join(_SUMMED)} FROM rollups_{{tier}}
            UNION ALL SELECT {{start}}, {_KEY[4:]}, {", ".join(_SUMMED)} FROM rollup_deltas
        ) AS s GROUP BY 1, 2, 3, 4, 5
    ), timed AS (
        SELECT {_KEY}, CAST(sum(n) AS bigint) AS timed FROM (
            SELECT {_KEY}, cnt FROM rollup_histograms_{{tier}} WHERE metric = 'e2e'
            UNION ALL SELECT {{start}}, {_KEY[4:]}, cnt FROM rollup_delta_histograms WHERE metric = 'e2e'
        ) AS h, unnest(cnt) AS n GROUP BY 1, 2, 3, 4, 5
    )
    SELECT count(*) FROM raw FULL JOIN summed USING ({_KEY}) LEFT JOIN timed USING ({_KEY})
    WHERE {" OR ".join(f"raw.{name} IS DISTINCT FROM summed.{name}" for name in _SUMMED)}
        OR coalesce(raw.timed, 0) <> coalesce(timed.timed, 0)"""
