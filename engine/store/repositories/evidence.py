"""What the traces say about a rollout's canary and its control.

What is counted comes from the compared requests (``compared``) and not from rollups, which know no assignment keys: the
key was randomised, so the key is what is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import event, text

from engine.contracts import CANARY, CONTROL, SlipstreamError
from engine.store.database import ReadSession, WriteSession
from engine.store.repositories import compared
from engine.store.repositories.compared import Window
from engine.store.segments import METRICS, Request, Segment, class_of

_AUDITS = text(
    """
    SELECT 'canary' AS arm, traffic_class, sum(audited)::bigint AS audited, sum(mismatches)::bigint AS mismatches
    FROM output_audits
    WHERE (generation = ANY(:generations) AND arm = 'canary')
       OR (generation = :promoted AND arm = 'champion' AND policy_version = :canary)
    GROUP BY GROUPING SETS ((traffic_class), ())
    HAVING sum(audited) > 0
    UNION ALL
    SELECT 'control', traffic_class, sum(audited)::bigint, sum(mismatches)::bigint
    FROM output_audits WHERE generation = ANY(:generations) AND arm = 'control'
    GROUP BY GROUPING SETS ((traffic_class), ())
    HAVING sum(audited) > 0
    """
)
"""Warm-up included, and the canary as champion too: a wrong output is one whenever it was served."""


@dataclass(frozen=True, slots=True)
class Promoted:
    """The canary as champion: its version, the generation since which, and those in which it was on trial."""

    version: int
    generation: int
    before: tuple[int, ...] = ()


class TooSlow(SlipstreamError):
    """A measurement took longer than it may."""


@contextmanager
def within(
    session: ReadSession | WriteSession, seconds: float, clock: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """All statements of the block together may take ``seconds``: each gets what those before it have left.

    TooSlow before a statement for which nothing is left; Postgres cancels the one that runs out of it.
    """
    connection, ends = session.connection(), clock() + seconds

    def allow(_connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        left = ends - clock()
        if left <= 0.0:
            raise TooSlow(f"measuring took longer than {seconds:g} s")
        cursor.execute(f"SET LOCAL statement_timeout = {max(1, round(1000 * left))}")

    event.listen(connection, "before_cursor_execute", allow)
    try:
        yield
    finally:
        event.remove(connection, "before_cursor_execute", allow)


def segments(
    session: ReadSession | WriteSession,
    windows: Sequence[Window],
    metrics: Collection[str] = METRICS,
    promoted: Promoted | None = None,
) -> list[Segment]:
    """What has been counted (``compared.take_in``) of all stages of a rollout, by arm and class.

    Outputs are audited from the first request of the canary to the last, as champion (``promoted``) too.
    """
    if not windows:
        return []
    generations = [window.generation for window in windows]
    asked: dict[str, Any] = {"generations": generations, "promoted": None, "canary": None}
    if promoted is not None:
        asked = {"promoted": promoted.generation, "canary": promoted.version}
        asked["generations"] = [*generations, *promoted.before]
    tally, found = compared.tally(session, generations[0]), list[Segment]()
    audits = _audits(session, asked, tally.classes())
    for counted in tally.segments(generations[-1], metrics):
        audited = audits.pop((counted.arm, counted.traffic_class), {})
        found.append(replace(counted, **audited))
    return [*found, *(Segment(**audited) for audited in audits.values())]  # of arms whose requests do not count yet


def _audits(
    session: ReadSession | WriteSession, asked: dict[str, Any], known: set[str]
) -> dict[tuple[str, str | None], dict[str, Any]]:
    """Audited outputs by arm and class, in the classes that requests are counted in."""
    audits: dict[tuple[str, str | None], dict[str, Any]] = {}
    for arm, name, audited, mismatches in session.execute(_AUDITS, asked):
        at = (arm, class_of(name, known) if name is not None else None)
        sums = audits.setdefault(at, {"arm": arm, "traffic_class": at[1], "audited": 0, "mismatches": 0})
        sums["audited"] += audited
        sums["mismatches"] += mismatches
    return audits


@dataclass(frozen=True, slots=True)
class Past:
    """Requests that one version served, oldest first, each under no arm yet, and the seconds they began within."""

    requests: Sequence[Request]
    seconds: float


def past(
    session: ReadSession,
    version: int,
    since: datetime,
    traffic_classes: Collection[str] | None = None,
    tenants: Collection[str] | None = None,
    limit: int = 20_000,
) -> Past:
    """The newest ``limit`` requests that a version served since then, of these classes and tenants (None: of all)."""
    rows = session.execute(
        text(
            "SELECT assignment_key, generation, traffic_class, status, retry, steps, accepted, e2e_s, ttft_s, tpot_s, "
            "draft_errors, nullif(cost_s, 0) / nullif(steps + accepted, 0) AS token_s, started_at FROM traces "
            "WHERE policy_version = :version AND started_at >= :since AND status <> 'rejected' "
            "AND (CAST(:classes AS text[]) IS NULL OR traffic_class = ANY(:classes)) "
            "AND (CAST(:tenants AS text[]) IS NULL OR tenant = ANY(:tenants)) "
            "ORDER BY started_at DESC LIMIT :limit"
        ),
        {
            "version": version,
            "since": since,
            "limit": limit,
            "classes": sorted(traffic_classes) if traffic_classes is not None else None,
            "tenants": sorted(tenants) if tenants is not None else None,
        },
    ).all()
    requests = [
        Request("", r.assignment_key, r.generation, r.traffic_class, r.status, r.retry, r.steps, r.accepted,
                (r.e2e_s, r.ttft_s, r.tpot_s, r.token_s), r.draft_errors)
        for r in reversed(rows)
    ]  # fmt: skip
    return Past(requests, (rows[0].started_at - rows[-1].started_at).total_seconds() if rows else 0.0)


def newest(session: ReadSession | WriteSession, window: Window) -> dict[str, datetime | None]:
    """When the last trace of each compared arm in this stage was written, warm-up included."""
    query = text(
        "SELECT max(written_at) FROM traces WHERE generation = :generation AND arm = :arm "
        "AND arm IN ('canary', 'control') "  # what the index is of
        "AND started_at >= CAST(:began AS timestamptz) - interval '1 day'"  # by the replica's clock
    )
    asked = {"generation": window.generation, "began": window.began}
    return {arm: session.scalar(query, asked | {"arm": arm}) for arm in (CANARY, CONTROL)}


def observed_share(
    session: ReadSession | WriteSession, window: Window, traffic_classes: Collection[str] | None = None
) -> float | None:
    """The canary's share of the eligible requests of this stage; None before the first."""
    canary, everything = session.execute(
        text(
            "SELECT coalesce(sum(requests) FILTER (WHERE arm = :canary), 0), coalesce(sum(requests), 0) "
            "FROM (SELECT at, generation, arm, traffic_class, requests FROM rollups_minute UNION ALL "
            "SELECT at, generation, arm, traffic_class, requests FROM rollup_deltas) AS rolled "
            "WHERE generation = :generation AND at >= date_trunc('minute', CAST(:began AS timestamptz), 'UTC') "
            "AND (CAST(:classes AS text[]) IS NULL OR traffic_class = ANY(:classes))"
        ),
        {
            "canary": CANARY,
            "generation": window.generation,
            "began": window.began,
            "classes": sorted(traffic_classes) if traffic_classes is not None else None,
        },
    ).one()
    return int(canary) / int(everything) if everything else None
