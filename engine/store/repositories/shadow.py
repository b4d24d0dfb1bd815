"""What a canary would have earned on requests that others served: written per request, read as the guards want it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import delete, func, select, text
from sqlalchemy.dialects.postgresql import insert

from engine.store.database import ReadSession, WriteSession
from engine.store.models import ShadowRequestRow
from engine.store.segments import CLASSES, OTHER, Segment


@dataclass(frozen=True, slots=True)
class ShadowRequest:
    """One policy over one served request (``ShadowRequestRow``)."""

    generation: int
    trace_id: UUID
    arm: str
    policy_version: int
    traffic_class: str
    assignment_key: str
    steps: int
    drafted: int
    accepted: int
    draft_s: float
    draft_errors: int = 0


def write(session: WriteSession, requests: Sequence[ShadowRequest]) -> None:
    """Each request and arm once, however often it is written."""
    if requests:
        session.execute(insert(ShadowRequestRow).values([asdict(one) for one in requests]).on_conflict_do_nothing())


_SEGMENTS = text(
    """
    WITH came AS (
        SELECT traffic_class AS name, row_number() OVER (ORDER BY min(seen_at), traffic_class) AS place
        FROM shadow_requests WHERE generation = :generation GROUP BY traffic_class
    ), told AS (
        SELECT shadow_requests.*, CASE WHEN place <= :classes THEN name ELSE :other END AS class
        FROM shadow_requests JOIN came ON name = traffic_class WHERE generation = :generation
    ), of_class AS (
        SELECT arm, class AS traffic_class, assignment_key, count(*) AS requests, sum(steps + accepted)::float8 AS x,
            sum(steps)::float8 AS y, bool_or(draft_errors > 0) AS failed
        FROM told GROUP BY arm, class, assignment_key
    ), of_key AS (
        SELECT arm, traffic_class, requests, x / nullif(y, 0) AS per_step, failed FROM of_class UNION ALL
        SELECT arm, NULL, sum(requests), sum(x) / nullif(sum(y), 0), bool_or(failed)
        FROM of_class GROUP BY arm, assignment_key
    )
    SELECT arm, traffic_class, sum(requests)::bigint AS requests, sum(requests)::bigint AS stage_requests,
        count(*) AS keys, count(per_step) AS n, coalesce(sum(per_step), 0) AS x, count(per_step)::float8 AS y,
        coalesce(sum(per_step * per_step), 0) AS xx, count(per_step)::float8 AS yy, coalesce(sum(per_step), 0) AS xy,
        count(*) FILTER (WHERE failed) AS error_keys, count(*) FILTER (WHERE failed) AS draft_error_keys
    FROM of_key GROUP BY arm, traffic_class ORDER BY arm, traffic_class NULLS FIRST
    """
)


def segments(session: ReadSession | WriteSession, generation: int) -> list[Segment]:
    """Counts and moments of canary and champion over the same requests; as in ``evidence``, without latencies.

    Both arms come from the same requests, so their difference varies less than two independent arms would: what is
    certain by these moments is certain.
    """
    asked = {"generation": generation, "classes": CLASSES, "other": OTHER}
    return [Segment(**row._mapping) for row in session.execute(_SEGMENTS, asked)]


def newest(session: ReadSession | WriteSession, generation: int) -> datetime | None:
    row = ShadowRequestRow
    return session.scalar(select(func.max(row.seen_at)).where(row.generation == generation))


def forget(session: WriteSession, before: datetime) -> None:
    """What was seen before then goes; decisions keep the counts that they were made of."""
    session.execute(delete(ShadowRequestRow).where(ShadowRequestRow.seen_at < before))
