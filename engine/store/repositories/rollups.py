"""Rollups as they are kept: compaction of the writers' deltas, rebuilding from the raw traces, retention.

All of it is set-based SQL. A delta leaves its table in the statement that adds it to every resolution, so nothing is
counted twice or lost whenever a process dies, and a delta that comes late is added like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any

from sqlalchemy import text

from engine.contracts import Objectives
from engine.store import histogram, locks
from engine.store.database import Database, ReadSession, WriteSession
from engine.store.repositories import partitions

MINUTE_KEY = ("at", "policy_version", "arm", "traffic_class", "replica_id", "generation")
LONG_KEY = MINUTE_KEY[:-1]
TIERS: dict[str, tuple[timedelta, tuple[str, ...]]] = {
    "minute": (timedelta(minutes=1), MINUTE_KEY),
    "ten_minutes": (timedelta(minutes=10), LONG_KEY),
    "hour": (timedelta(hours=1), LONG_KEY),
    "day": (timedelta(days=1), LONG_KEY),
}
"""Resolutions, finest first: how long one of their rows is, and what it is about. Tables are rollups_{tier}."""
COUNTS = (
    *("requests", "errors", "cancelled", "retries", "preemptions", "good"),
    *("prompt_tokens", "output_tokens", "steps", "drafted", "accepted"),
)
REALS = (
    *("draft_s", "verify_s", "decode_s", "other_s", "cost_s", "plain_s"),
    *("expected_accepted", "expected_plain_s", "expected_cost_s", "e2e_s"),
)
POSITIONS = ("drafted_per_pos", "accepted_per_pos")
METRICS = ("ttft", "tpot", "e2e", "queue", "acceptance_length")
"""What has a histogram: four durations in seconds, and the acceptance length of one request."""
PIECE = timedelta(hours=1)
"""What one compaction takes at most, so that the backlog of a day ends in bounded statements, not in a timeout."""
_PATIENCE = {"lock_timeout": "10min", "statement_timeout": "0", "idle_in_transaction_session_timeout": "0"}
TABLES = (
    *("rollup_deltas", "rollup_delta_histograms"),
    *(f"{kind}_{tier}" for tier in TIERS for kind in ("rollups", "rollup_histograms")),
)


@dataclass(frozen=True, slots=True)
class Freshness:
    """How far compaction is: deltas that wait, and the minute of the oldest of them."""

    waiting: int
    oldest: datetime | None


class Busy(Exception):
    """Another process compacts or rebuilds at this moment."""


def compact(session: WriteSession, closed: datetime) -> bool:
    """Add the oldest ``PIECE`` of the deltas of minutes before ``closed`` to every tier; whether there may be more.

    ``Busy`` when another process is at it.
    """
    if not session.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": locks.COMPACTOR}):
        raise Busy("another process compacts or rebuilds the rollups")
    oldest = session.scalar(text("SELECT min(at) FROM rollup_deltas WHERE at < :closed"), {"closed": closed})
    if oldest is None:
        return False
    until = min(oldest + PIECE, closed)
    for day in sorted({at.astimezone(UTC).date() for at in (oldest, until - timedelta(microseconds=1))}):
        partitions.ensure(session, day)
    session.execute(text(_COMPACT_SUMS), {"closed": until})
    session.execute(text(_COMPACT_HISTOGRAMS), {"closed": until})
    return until < closed


@contextmanager
def turn(database: Database) -> Iterator[None]:
    """Wait until nobody compacts or rebuilds, and keep it so for the block.

    The lock is a transaction's of its own: one that waited inside the transaction that rebuilds would see the moment
    before the wait.
    """
    with database.write() as session:
        _take_time(session)
        take_turn(session)
        yield


def take_turn(session: WriteSession) -> None:
    """Wait until nobody compacts or rebuilds; nobody does until this transaction ends."""
    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": locks.COMPACTOR})


def rebuild(session: WriteSession, day: date, objectives: Objectives) -> int:
    """Make the rollups of one UTC day again from its traces; how many traces there were. It wants its ``turn``.

    A day whose partition of traces is gone keeps its rollups: they are all that is known of it.
    ``session`` must see one moment (``Database.snapshot``): a batch that is written meanwhile then keeps its deltas,
    and its traces are not seen here.
    """
    _take_time(session)
    session.execute(text("SET LOCAL work_mem = '128MB'"))  # a million values are sorted into buckets
    session.execute(text("LOCK TABLE traces IN ACCESS SHARE MODE"))  # from here on its partition is not dropped
    if not partitions.is_there(session, "traces", day):
        return 0
    partitions.ensure(session, day)
    since = datetime(day.year, day.month, day.day, tzinfo=UTC)
    window = {"since": since, "until": since + timedelta(days=1)}
    for table in TABLES:
        session.execute(text(f"DELETE FROM {table} WHERE at >= :since AND at < :until"), window)
    goal = {
        "ttft": objectives.ttft_s,
        "tpot": objectives.tpot_s,
        "smallest": histogram.SMALLEST,
        "log_gamma": histogram.LOG_GAMMA,
    }
    session.execute(text(_REBUILD_MINUTES), window | goal)
    session.execute(text(_REBUILD_MINUTE_HISTOGRAMS), window | goal)
    for statement in _REBUILD_LONGER:
        session.execute(text(statement), window)
    rebuilt = text("SELECT coalesce(sum(requests), 0) FROM rollups_day WHERE at >= :since AND at < :until")
    return int(session.execute(rebuilt, window).scalar_one())


def _take_time(session: WriteSession) -> None:
    """Nobody waits for this transaction, and it may wait."""
    for bound, most in _PATIENCE.items():
        session.execute(text(f"SET LOCAL {bound} = '{most}'"))


def freshness(session: ReadSession) -> Freshness:
    return Freshness(*session.execute(text("SELECT count(*), min(at) FROM rollup_deltas")).one())


def forget(session: WriteSession, tier: str, before: datetime) -> int:
    """Delete the rows of a tier that has no partitions: a few thousand a day at most."""
    gone = 0
    for kind in ("rollups", "rollup_histograms"):
        result: Any = session.execute(text(f"DELETE FROM {kind}_{tier} WHERE at < :before"), {"before": before})
        gone += result.rowcount
    return gone


def forget_batches(session: WriteSession, before: datetime) -> int:
    """Delete the keys of batches too old to be written again; a trace's own key still keeps it from coming twice."""
    result: Any = session.execute(text("DELETE FROM trace_batches WHERE written_at < :before"), {"before": before})
    return int(result.rowcount)


def _list(names: Sequence[str], form: str = "{}") -> str:
    return ", ".join(form.format(name) for name in names)


def _sums(source: str, key: Sequence[str]) -> str:
    """SELECT of one row per key over ``source``, a relation with the columns of a rollup; arrays sum by place."""
    totals = ", ".join(
        [
            *(f"CAST(sum({name}) AS bigint) AS {name}" for name in COUNTS),
            *(f"sum({name}) AS {name}" for name in REALS),
        ]
    )
    arrays = _list(POSITIONS, "coalesce({0}, '{{}}') AS {0}")
    return f"""
        SELECT {_list(key)}, {_list((*COUNTS, *REALS))}, {arrays}
        FROM (SELECT {_list(key)}, {totals} FROM {source} GROUP BY {_list(key)}) AS total
        LEFT JOIN (
            SELECT {_list(key)}, array_agg(d ORDER BY place) AS drafted_per_pos,
                array_agg(a ORDER BY place) AS accepted_per_pos
            FROM (
                SELECT {_list(key)}, place, CAST(sum(coalesce(d, 0)) AS bigint) AS d,
                    CAST(sum(coalesce(a, 0)) AS bigint) AS a
                FROM {source}, unnest(drafted_per_pos, accepted_per_pos) WITH ORDINALITY AS p (d, a, place)
                GROUP BY {_list(key)}, place
            ) AS by_place GROUP BY {_list(key)}
        ) AS places USING ({_list(key)})"""


def _histograms(source: str, key: Sequence[str]) -> str:
    """The same of histograms: ``source`` has a row per key and sparse histogram."""
    return f"""
        SELECT {_list(key)}, array_agg(bucket ORDER BY bucket) AS idx, array_agg(n ORDER BY bucket) AS cnt
        FROM (
            SELECT {_list(key)}, bucket, CAST(sum(n) AS integer) AS n
            FROM {source}, unnest(idx, cnt) AS b (bucket, n) GROUP BY {_list(key)}, bucket
        ) AS by_bucket GROUP BY {_list(key)}"""


def _add_sums(table: str, source: str, key: Sequence[str]) -> str:
    """INSERT of sums, added to the row that is there."""
    added = [f"{name} = {table}.{name} + excluded.{name}" for name in (*COUNTS, *REALS)]
    added += [
        f"{name} = (SELECT coalesce(array_agg(coalesce(x, 0) + coalesce(y, 0) ORDER BY place), '{{}}') "
        f"FROM unnest({table}.{name}, excluded.{name}) WITH ORDINALITY AS p (x, y, place))"
        for name in POSITIONS
    ]
    columns = _list((*key, *COUNTS, *REALS, *POSITIONS))
    return (
        f"INSERT INTO {table} ({columns}) {_sums(source, key)} ON CONFLICT ({_list(key)}) DO UPDATE SET "
        + ", ".join(added)
    )


def _add_histograms(table: str, source: str, key: Sequence[str]) -> str:
    both = f"""
        SELECT array_agg(bucket ORDER BY bucket), array_agg(n ORDER BY bucket) FROM (
            SELECT bucket, CAST(sum(n) AS integer) AS n FROM (
                SELECT * FROM unnest({table}.idx, {table}.cnt)
                UNION ALL SELECT * FROM unnest(excluded.idx, excluded.cnt)
            ) AS each (bucket, n) GROUP BY bucket
        ) AS merged"""
    return (
        f"INSERT INTO {table} ({_list((*key, 'idx', 'cnt'))}) {_histograms(source, key)} "
        f"ON CONFLICT ({_list(key)}) DO UPDATE SET (idx, cnt) = ({both})"
    )


def _start(tier: str) -> str:
    """SQL: the start of the row of a tier that ``at`` is in."""
    seconds = int(TIERS[tier][0].total_seconds())
    return f"date_bin(interval '{seconds} s', at, timestamptz '2000-01-01 00:00:00Z') AS at"


def _longer(source: str, tier: str) -> str:
    return f"(SELECT {_start(tier)}, {_list((*LONG_KEY[1:], *COUNTS, *REALS, *POSITIONS))} FROM {source}) AS source"


def _longer_histograms(source: str, tier: str) -> str:
    return f"(SELECT {_start(tier)}, metric, {_list((*LONG_KEY[1:], 'idx', 'cnt'))} FROM {source}) AS source"


def _compact(deltas: str, inserts: Sequence[str]) -> str:
    tiers = ", ".join(f"{tier} AS ({insert})" for tier, insert in zip(TIERS, inserts, strict=True))
    return f"WITH gone AS (DELETE FROM {deltas} WHERE at < :closed RETURNING *), {tiers} SELECT count(*) FROM gone"


_LONGER = tuple(TIERS)[1:]
_OF_DAY = "{} WHERE at >= :since AND at < :until"
_COMPACT_SUMS = _compact(
    "rollup_deltas",
    [
        _add_sums("rollups_minute", "gone", MINUTE_KEY),
        *(_add_sums(f"rollups_{tier}", _longer("gone", tier), LONG_KEY) for tier in _LONGER),
    ],
)
_COMPACT_HISTOGRAMS = _compact(
    "rollup_delta_histograms",
    [
        _add_histograms("rollup_histograms_minute", "gone", ("metric", *MINUTE_KEY)),
        *(
            _add_histograms(f"rollup_histograms_{tier}", _longer_histograms("gone", tier), ("metric", *LONG_KEY))
            for tier in _LONGER
        ),
    ],
)

_WELL = "(ttft_s <= :ttft AND (tpot_s IS NULL OR tpot_s <= :tpot) AND status = 'ok')"
_RAW = f"""(
    SELECT date_trunc('minute', started_at, 'UTC') AS at, {_list(MINUTE_KEY[1:])}, 1 AS requests,
        CAST(status IN ('error', 'timeout') AS integer) AS errors, CAST(status = 'cancelled' AS integer) AS cancelled,
        CAST(retry > 0 AS integer) AS retries, preemptions, CAST(coalesce({_WELL}, false) AS integer) AS good,
        prompt_tokens, output_tokens, steps, drafted, accepted, drafted_per_pos, accepted_per_pos, draft_s, verify_s,
        other_s, cost_s, plain_s, expected_accepted, expected_plain_s, expected_cost_s, e2e_s,
        CASE WHEN ttft_s IS NULL THEN 0 ELSE greatest(e2e_s - ttft_s, 0) END AS decode_s
    FROM traces WHERE started_at >= :since AND started_at < :until) AS raw"""
_BUCKET = "CAST(ceil(ln(greatest(v, CAST(:smallest AS float8))) / CAST(:log_gamma AS float8)) AS smallint)"
_RAW_HISTOGRAMS = f"""
    SELECT {_list(MINUTE_KEY)}, metric, array_agg(bucket ORDER BY bucket), array_agg(n ORDER BY bucket) FROM (
        SELECT date_trunc('minute', started_at, 'UTC') AS at, {_list(MINUTE_KEY[1:])}, metric, {_BUCKET} AS bucket,
            CAST(count(*) AS integer) AS n
        FROM traces, LATERAL (VALUES ('ttft', ttft_s), ('tpot', tpot_s), ('e2e', e2e_s), ('queue', queue_s),
            ('acceptance_length', 1 + accepted / CAST(nullif(steps, 0) AS float8))) AS m (metric, v)
        WHERE started_at >= :since AND started_at < :until AND status = 'ok' AND v IS NOT NULL
        GROUP BY 1, {_list(MINUTE_KEY[1:])}, metric, bucket
    ) AS by_bucket GROUP BY {_list(MINUTE_KEY)}, metric"""
_REBUILD_MINUTES = (
    f"INSERT INTO rollups_minute ({_list((*MINUTE_KEY, *COUNTS, *REALS, *POSITIONS))}) {_sums(_RAW, MINUTE_KEY)}"
)
_REBUILD_MINUTE_HISTOGRAMS = (
    f"INSERT INTO rollup_histograms_minute ({_list((*MINUTE_KEY, 'metric', 'idx', 'cnt'))}) {_RAW_HISTOGRAMS}"
)
_REBUILD_LONGER = [
    statement
    for finer, tier in pairwise(TIERS)
    for statement in (
        _add_sums(f"rollups_{tier}", _longer(_OF_DAY.format(f"rollups_{finer}"), tier), LONG_KEY),
        _add_histograms(
            f"rollup_histograms_{tier}",
            _longer_histograms(_OF_DAY.format(f"rollup_histograms_{finer}"), tier),
            ("metric", *LONG_KEY),
        ),
    )
]
