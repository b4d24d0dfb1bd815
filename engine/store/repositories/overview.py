"""What the dashboard shows over time, from rollups: sums and percentiles over any window, filter and grouping.

A panel costs what its buckets cost, not what its traces cost. Readers sum the writers' delta rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import text

from engine.store import histogram
from engine.store.database import ReadSession

DIMENSIONS = frozenset({"policy_version", "arm", "traffic_class", "replica_id"})
METRICS = frozenset({"ttft", "tpot", "e2e", "queue"})
SUMS = {
    "bigint": (
        *("requests", "errors", "cancelled", "retries", "prompt_tokens", "output_tokens"),
        *("steps", "drafted", "accepted"),
    ),
    "double precision": ("draft_s", "verify_s", "decode_s"),
}
"""Column type of a sum → the columns."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A window of time [since, until) and what of it: None means all."""

    since: datetime
    until: datetime
    traffic_class: str | None = None
    arm: str | None = None
    version: int | None = None

    def before(self) -> Slice:
        """The window of the same length that ends where this one begins."""
        length = self.until - self.since
        return Slice(self.since - length, self.since, self.traffic_class, self.arm, self.version)

    def bin(self, most: int = 90) -> timedelta:
        """A round bin width that gives at most so many bins; never under the minute of a rollup."""
        seconds = (self.until - self.since).total_seconds() / most
        rounds = (60, 120, 180, 300, 600, 900, 1_800, 3_600, 7_200, 14_400, 21_600, 43_200, 86_400)
        return timedelta(seconds=next((r for r in rounds if r >= seconds), rounds[-1]))


def sums(
    session: ReadSession, part: Slice, by: Sequence[str] = (), width: timedelta | None = None
) -> list[dict[str, Any]]:
    """Sums per group and, with a ``width``, per time bin ("at"), oldest first."""
    columns = _columns(by, width)
    # Postgres sums bigint as numeric, which arrives as Decimal.
    totals = ", ".join(f"CAST(sum({name}) AS {kind}) AS {name}" for kind, names in SUMS.items() for name in names)
    query = f"SELECT {_list(columns.values(), totals)} FROM rollups_minute {_where(part)} {_group(columns)}"
    return [dict(row) for row in session.execute(text(query), _parameters(part, width)).mappings()]


def quantiles(
    session: ReadSession,
    part: Slice,
    metric: str,
    qs: Sequence[float],
    by: Sequence[str] = (),
    width: timedelta | None = None,
) -> list[dict[str, Any]]:
    """Quantiles in seconds, as "q50", "q95", …, per group and time bin; within 1 % of those of the raw traces."""
    names = [f"q{q * 100:g}" for q in qs]
    found = []
    for group, buckets in _histograms(session, part, metric, by, width).items():
        values = histogram.quantiles(buckets, qs)
        keys = [*(("at",) if width else ()), *by]
        found.append(dict(zip(keys, group, strict=True)) | dict(zip(names, values, strict=True)))
    return found


def buckets(session: ReadSession, part: Slice, metric: str, width: timedelta) -> list[tuple[datetime, int, int]]:
    """(time bin, bucket, count) for a heat map."""
    found = _histograms(session, part, metric, (), width)
    return [(at, bucket, n) for (at,), counts in found.items() for bucket, n in sorted(counts.items())]


def positions(session: ReadSession, part: Slice, by: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Drafted and accepted per draft position (0-based), per group."""
    columns = _columns(by, None)
    query = f"""
        SELECT {_list(columns.values(), "p.position - 1 AS position")},
               CAST(sum(p.drafted) AS bigint) AS drafted, CAST(sum(coalesce(p.accepted, 0)) AS bigint) AS accepted
        FROM rollups_minute,
             unnest(drafted_per_pos, accepted_per_pos) WITH ORDINALITY AS p (drafted, accepted, position)
        {_where(part)} {_group([*columns, "position"])}
    """
    return [dict(row) for row in session.execute(text(query), _parameters(part, None)).mappings()]


def known(session: ReadSession, part: Slice) -> dict[str, list[Any]]:
    """The classes, arms and versions that have traffic in the window: what the filters offer."""
    query = text(
        "SELECT DISTINCT traffic_class, arm, policy_version FROM rollups_minute "
        "WHERE minute >= :since AND minute < :until"
    )
    rows = session.execute(query, {"since": part.since, "until": part.until}).all()
    return {
        "classes": sorted({row[0] for row in rows}),
        "arms": sorted({row[1] for row in rows}),
        "versions": sorted({row[2] for row in rows}),
    }


def newest(session: ReadSession) -> datetime | None:
    """When the newest trace began: how old what a page shows is."""
    return session.scalar(text("SELECT max(started_at) FROM traces"))


def _histograms(
    session: ReadSession, part: Slice, metric: str, by: Sequence[str], width: timedelta | None
) -> dict[tuple[Any, ...], dict[int, int]]:
    if metric not in METRICS:
        raise ValueError(f"no histogram of {metric!r}; there are {sorted(METRICS)}")
    columns = _columns(by, width)
    query = f"""
        SELECT {_list(columns.values(), "b.idx AS bucket, sum(b.cnt) AS n")}
        FROM rollup_histograms, unnest(idx, cnt) AS b (idx, cnt)
        {_where(part)} AND metric = :metric {_group([*columns, "bucket"])}
    """
    grouped: dict[tuple[Any, ...], dict[int, int]] = defaultdict(dict)
    for row in session.execute(text(query), _parameters(part, width) | {"metric": metric}):
        *group, bucket, n = row
        grouped[tuple(group)][bucket] = int(n)
    return grouped


def _columns(by: Sequence[str], width: timedelta | None) -> dict[str, str]:
    """Result name → SQL, of what is grouped by. Only known names reach the statement."""
    if unknown := set(by) - DIMENSIONS:
        raise ValueError(f"cannot group by {sorted(unknown)}; there are {sorted(DIMENSIONS)}")
    at = {"at": "date_bin(:width, minute, timestamptz '2000-01-01 00:00:00Z') AS at"} if width else {}
    return at | {name: name for name in by}


def _list(columns: Iterable[str], rest: str) -> str:
    return ", ".join([*columns, rest])


def _group(columns: Collection[str]) -> str:
    """Group and order by the first columns of the list, by their number."""
    if not columns:
        return ""
    names = ", ".join(str(position) for position in range(1, len(columns) + 1))
    return f"GROUP BY {names} ORDER BY {names}"


def _where(part: Slice) -> str:
    clauses = ["minute >= :since", "minute < :until"]
    for value, clause in (
        (part.traffic_class, "traffic_class = :traffic_class"),
        (part.arm, "arm = :arm"),
        (part.version, "policy_version = :version"),
    ):
        if value is not None:
            clauses.append(clause)
    return "WHERE " + " AND ".join(clauses)


def _parameters(part: Slice, width: timedelta | None) -> dict[str, Any]:
    values = {
        "since": part.since,
        "until": part.until,
        "traffic_class": part.traffic_class,
        "arm": part.arm,
        "version": part.version,
        "width": width,
    }
    return {name: value for name, value in values.items() if value is not None}
