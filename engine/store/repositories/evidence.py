"""What the traces say about a rollout's canary and its control: one aggregate, made anew on every tick."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import text

from engine.contracts import CANARY
from engine.store.database import ReadSession, WriteSession


@dataclass(frozen=True, slots=True)
class Window:
    """One stage of a rollout: its ledger generation, when it began, since when its requests count (warm-up over)."""

    generation: int
    began: datetime
    counts_from: datetime


@dataclass(frozen=True, slots=True)
class Segment:
    """The requests of one arm in one traffic class, or in all classes together (``traffic_class`` None).

    ``keys`` and ``error_keys`` count assignment keys, not requests: the key is what was randomised, and a client that
    retries one failing request ten times is one event. Σx and Σy are over requests that took a verify step, with
    x = steps + accepted (tokens committed by verify steps, bonus included) and y = steps. Latencies are seconds, of
    requests that ended well; None where there was none. ``stage_requests`` are those of the newest stage.
    """

    arm: str
    traffic_class: str | None
    requests: int
    stage_requests: int
    keys: int
    error_keys: int
    errors: int
    cancelled: int
    retries: int
    n: int
    x: float
    y: float
    xx: float
    yy: float
    xy: float
    e2e_p50: float | None = None
    e2e_p95: float | None = None
    ttft_p50: float | None = None
    ttft_p95: float | None = None
    tpot_p50: float | None = None
    tpot_p95: float | None = None


_SEGMENTS = text(
    """
    WITH stage AS (
        SELECT * FROM unnest(CAST(:generations AS bigint[]), CAST(:counts_from AS timestamptz[]))
            AS s(generation, since)
    ), request AS (
        SELECT traces.*, steps + accepted AS committed, status = 'ok' AS fine, status IN ('error', 'timeout') AS failed
        FROM traces JOIN stage USING (generation)
        WHERE started_at >= stage.since AND started_at >= :earliest
          AND arm IN ('canary', 'control') AND status <> 'rejected'
    )
    SELECT arm, traffic_class, count(*), count(*) FILTER (WHERE generation = :current),
        count(DISTINCT assignment_key), count(DISTINCT assignment_key) FILTER (WHERE failed),
        count(*) FILTER (WHERE failed), count(*) FILTER (WHERE status = 'cancelled'),
        count(*) FILTER (WHERE retry > 0),
        count(*) FILTER (WHERE steps > 0), coalesce(sum(committed), 0), coalesce(sum(steps), 0),
        coalesce(sum(committed::float8 * committed) FILTER (WHERE steps > 0), 0),
        coalesce(sum(steps::float8 * steps), 0), coalesce(sum(committed::float8 * steps), 0),
        percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY e2e_s) FILTER (WHERE fine),
        percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY ttft_s) FILTER (WHERE fine),
        percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY tpot_s) FILTER (WHERE fine)
    FROM request GROUP BY GROUPING SETS ((arm, traffic_class), (arm))
    ORDER BY arm, traffic_class NULLS FIRST
    """
)


def segments(session: ReadSession | WriteSession, windows: Sequence[Window]) -> list[Segment]:
    """Counts, moments and quantiles by arm and class over all stages of a rollout, each after its warm-up."""
    if not windows:
        return []
    rows = session.execute(
        _SEGMENTS,
        {
            "generations": [window.generation for window in windows],
            "counts_from": [window.counts_from for window in windows],
            "earliest": min(window.counts_from for window in windows),
            "current": windows[-1].generation,
        },
    )
    found = []
    for arm, traffic_class, *rest in rows:
        counts = [int(value) for value in rest[:8]]
        moments = [float(value) for value in rest[8:13]]
        quantiles = [value for pair in rest[13:] for value in (pair or (None, None))]
        found.append(Segment(arm, traffic_class, *counts, *moments, *quantiles))
    return found


def newest(session: ReadSession | WriteSession, window: Window) -> datetime | None:
    """When the last trace of either compared arm in this stage was written, warm-up included."""
    return session.scalar(
        text(
            "SELECT max(written_at) FROM traces WHERE generation = :generation AND started_at >= :began "
            "AND arm IN ('canary', 'control')"
        ),
        {"generation": window.generation, "began": window.began},
    )


def observed_share(
    session: ReadSession | WriteSession, window: Window, traffic_classes: Collection[str] | None = None
) -> float | None:
    """The canary's share of the eligible requests of this stage; None before the first."""
    canary, everything = session.execute(
        text(
            "SELECT count(*) FILTER (WHERE arm = :canary), count(*) FROM traces WHERE generation = :generation "
            "AND started_at >= :began AND (CAST(:classes AS text[]) IS NULL OR traffic_class = ANY(:classes))"
        ),
        {
            "canary": CANARY,
            "generation": window.generation,
            "began": window.began,
            "classes": sorted(traffic_classes) if traffic_classes is not None else None,
        },
    ).one()
    return canary / everything if everything else None
