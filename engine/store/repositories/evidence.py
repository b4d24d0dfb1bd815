"""What the traces say about a rollout's canary and its control, made anew on every tick.

All of it comes from the compared requests (a partial index holds no others) and not from rollups, which know no
assignment keys: the key was randomised, so the key is what is counted.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
from sqlalchemy import event, text

from engine.contracts import CANARY, SlipstreamError
from engine.store import histogram
from engine.store.database import ReadSession, WriteSession

Counts = tuple[Sequence[int], Sequence[float]]
"""A sparse log histogram: (bucket indices ascending, keys)."""


@dataclass(frozen=True, slots=True)
class Window:
    """One stage of a rollout: its ledger generation, when it began, since when its requests count (warm-up over)."""

    generation: int
    began: datetime
    counts_from: datetime


@dataclass(frozen=True, slots=True)
class Segment:
    """The requests of one arm in one traffic class, or in all classes together (``traffic_class`` None).

    ``keys`` and ``…_keys`` count assignment keys, not requests: the key is what was randomised, and a client that
    retries one failing request ten times is one event. ``error_keys`` met an error of their request or, those of
    ``draft_error_keys``, of its draft, without which the engine went on. ``n`` are the keys that took a verify step,
    and Σ is over them: x_k = steps + accepted (tokens committed by verify steps, bonus included) and y_k = steps, each
    summed over all requests of key k in this class. ``latencies`` holds, per metric, the log histogram of requests that
    ended well, in which a key weighs one in all: each of its m requests 1/m.
    ``stage_requests`` are those of the newest stage; ``audited`` and ``mismatches`` count outputs that were replayed
    without a draft, and those that differed.
    """

    arm: str
    traffic_class: str | None
    requests: int = 0
    stage_requests: int = 0
    keys: int = 0
    error_keys: int = 0
    timeout_keys: int = 0
    retry_keys: int = 0
    cancelled: int = 0
    n: int = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    audited: int = 0
    mismatches: int = 0
    draft_error_keys: int = 0
    latencies: dict[str, Counts] = field(default_factory=dict)

    def quantile(self, metric: str, q: float) -> float | None:
        """Seconds; None of nothing."""
        indices, counts = self.latencies.get(metric, ((), ()))
        if not len(indices):
            return None
        cumulated = np.cumsum(counts)
        rank = math.floor(q * (int(cumulated[-1]) - 1))
        return histogram.value(int(indices[int(np.searchsorted(cumulated, rank, side="right"))]))


_STAGE = """
    stage AS (
        SELECT generation, since
        FROM unnest(CAST(:generations AS bigint[]), CAST(:counts_from AS timestamptz[])) AS s(generation, since)
    )"""

_COMPARED = """
    FROM traces JOIN stage USING (generation)
    WHERE started_at >= stage.since AND started_at >= :earliest
      AND arm IN ('canary', 'control') AND status <> 'rejected'
"""

_SUMS = text(
    f"""
    WITH {_STAGE}, of_class AS MATERIALIZED (
        SELECT arm, traffic_class, hashtextextended(assignment_key, 0) AS key, count(*) AS requests,
            count(*) FILTER (WHERE generation = :current) AS stage_requests,
            count(*) FILTER (WHERE status = 'cancelled') AS cancelled,
            coalesce(sum(steps + accepted) FILTER (WHERE steps > 0), 0)::float8 AS x, sum(steps)::float8 AS y
        {_COMPARED} GROUP BY arm, traffic_class, key
    ), of_key AS (
        SELECT arm, traffic_class, requests, stage_requests, cancelled, x, y FROM of_class UNION ALL
        SELECT arm, NULL, sum(requests), sum(stage_requests), sum(cancelled), sum(x), sum(y) FROM of_class
        GROUP BY arm, key
    )
    SELECT arm, traffic_class, sum(requests)::bigint AS requests, sum(stage_requests)::bigint AS stage_requests,
        sum(cancelled)::bigint AS cancelled, count(*) AS keys, count(*) FILTER (WHERE y > 0) AS n,
        sum(x) AS x, sum(y) AS y, sum(x * x) AS xx, sum(y * y) AS yy, sum(x * y) AS xy
    FROM of_key GROUP BY arm, traffic_class ORDER BY arm, traffic_class NULLS FIRST
    """
)
"""Requests of one key share its arm and are alike, so what is squared is the sum of a key, never a single request.

Keys are hashed: a few times faster than texts, and two of a million share one of 2^64 values with odds of 3e-8.
"""

_EVENTS = text(
    f"""
    WITH {_STAGE}
    SELECT arm, traffic_class,
        count(DISTINCT assignment_key) FILTER (WHERE status = 'error' OR draft_errors > 0) AS error_keys,
        count(DISTINCT assignment_key) FILTER (WHERE draft_errors > 0) AS draft_error_keys,
        count(DISTINCT assignment_key) FILTER (WHERE status = 'timeout') AS timeout_keys,
        count(DISTINCT assignment_key) FILTER (WHERE retry > 0) AS retry_keys
    {_COMPARED} AND (status IN ('error', 'timeout') OR retry > 0 OR draft_errors > 0)
    GROUP BY GROUPING SETS ((arm, traffic_class), (arm))
    """
)

_LATENCIES = text(
    f"""
    WITH {_STAGE}, request AS (
        SELECT hashtextextended(assignment_key, 0) AS key, arm, traffic_class, e2e_s, ttft_s, tpot_s,
            nullif(cost_s, 0) / nullif(steps + accepted, 0) AS cost_s
        FROM traces JOIN stage USING (generation)
        WHERE started_at >= stage.since AND started_at >= :earliest AND arm IN ('canary', 'control') AND status = 'ok'
    ), shared AS (
        SELECT arm, traffic_class, e2e_s, ttft_s, tpot_s, cost_s, count(e2e_s) OVER of_key AS e2e_n,
            count(ttft_s) OVER of_key AS ttft_n, count(tpot_s) OVER of_key AS tpot_n,
            count(cost_s) OVER of_key AS cost_n, count(e2e_s) OVER of_class AS e2e_c,
            count(ttft_s) OVER of_class AS ttft_c, count(tpot_s) OVER of_class AS tpot_c,
            count(cost_s) OVER of_class AS cost_c
        FROM request
        WINDOW of_key AS (PARTITION BY key, arm), of_class AS (PARTITION BY key, arm, traffic_class)
    ), weighed AS (
        SELECT arm, traffic_class, metric, ceil(ln(greatest(seconds, :smallest)) / :log_gamma)::int AS idx,
            1 / n::float8 AS of_all, 1 / c::float8 AS of_class
        FROM shared, LATERAL (
            VALUES ('e2e', e2e_s, e2e_n, e2e_c), ('ttft', ttft_s, ttft_n, ttft_c), ('tpot', tpot_s, tpot_n, tpot_c),
                ('cost', cost_s, cost_n, cost_c)
        ) AS m(metric, seconds, n, c)
        WHERE metric = ANY(:metrics) AND seconds IS NOT NULL
    ), bucket AS (
        SELECT arm, traffic_class, metric, idx, sum(of_class) AS keys, sum(of_all) AS keys_of_all
        FROM weighed GROUP BY arm, traffic_class, metric, idx
    )
    SELECT arm, traffic_class, metric, array_agg(idx ORDER BY idx),
        array_agg(round(keys::numeric, 4)::float8 ORDER BY idx)
    FROM (
        SELECT arm, traffic_class, metric, idx, keys FROM bucket
        UNION ALL SELECT arm, NULL, metric, idx, sum(keys_of_all) FROM bucket GROUP BY arm, metric, idx
    ) AS merged GROUP BY arm, traffic_class, metric
    """
)
"""A key is one observation, shared by its requests: a request of a key with m of them counts 1/m (``quantiles``)."""

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
    metrics: Collection[str] = ("e2e", "ttft", "tpot"),
    promoted: Promoted | None = None,
) -> list[Segment]:
    """Counts, moments and histograms by arm and class over all stages of a rollout, each after its warm-up.

    Outputs are audited from the first request of the canary to the last, as champion (``promoted``) too.
    """
    if not windows:
        return []
    values = {
        "generations": [window.generation for window in windows],
        "counts_from": [window.counts_from for window in windows],
        "earliest": min(window.counts_from for window in windows),
    }
    session.execute(text("SET LOCAL work_mem = '64MB'"))  # sorts and hashes of a long rollout stay in memory
    buckets = values | {
        "metrics": sorted(metrics),
        "smallest": histogram.SMALLEST,
        "log_gamma": histogram.LOG_GAMMA,
    }
    latencies: dict[tuple[str, str | None], dict[str, Counts]] = defaultdict(dict)
    for arm, traffic_class, metric, indices, counts in session.execute(_LATENCIES, buckets):
        latencies[arm, traffic_class][metric] = (indices, counts)
    events = {(row.arm, row.traffic_class): dict(row._mapping) for row in session.execute(_EVENTS, values)}
    generations = [window.generation for window in windows]
    asked: dict[str, Any] = {"generations": generations, "promoted": None, "canary": None}
    if promoted is not None:
        asked = {"promoted": promoted.generation, "canary": promoted.version}
        asked["generations"] = [*generations, *promoted.before]
    audits = {(row.arm, row.traffic_class): dict(row._mapping) for row in session.execute(_AUDITS, asked)}
    found = []
    for row in session.execute(_SUMS, values | {"current": windows[-1].generation}):
        key = (row.arm, row.traffic_class)
        tree: dict[str, Any] = events.get(key, {}) | audits.pop(key, {}) | dict(row._mapping)
        tree |= {name: float(tree[name] or 0) for name in ("x", "y", "xx", "yy", "xy")}
        found.append(Segment(**tree, latencies=latencies.get(key, {})))
    return [*found, *(Segment(**audited) for audited in audits.values())]  # of arms whose requests do not count yet


@dataclass(frozen=True, slots=True)
class PastRequest:
    """What guards look at in one request that was served. ``cost_s`` is of one token, as in the guards' metric."""

    started_at: datetime
    assignment_key: str
    traffic_class: str
    status: str
    retry: int
    steps: int
    accepted: int
    e2e_s: float
    ttft_s: float | None
    tpot_s: float | None
    draft_errors: int = 0
    cost_s: float | None = None


def past(session: ReadSession, version: int, since: datetime, limit: int = 20_000) -> list[PastRequest]:
    """The newest ``limit`` requests that a version served since then, oldest first."""
    rows = session.execute(
        text(
            "SELECT started_at, assignment_key, traffic_class, status, retry, steps, accepted, e2e_s, ttft_s, tpot_s, "
            "draft_errors, nullif(cost_s, 0) / nullif(steps + accepted, 0) FROM traces "
            "WHERE policy_version = :version AND started_at >= :since AND status <> 'rejected' "
            "ORDER BY started_at DESC LIMIT :limit"
        ),
        {"version": version, "since": since, "limit": limit},
    )
    return [PastRequest(*row) for row in reversed(rows.all())]


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
