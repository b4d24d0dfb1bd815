"""What the dashboard shows over time, from rollups: sums and percentiles over any window, filter and grouping.

A panel costs what its buckets cost, not what its traces cost. A window is read per day, hour or ten minutes, its ragged
ends at finer resolution. What the compactor has not taken yet is read from the writers' deltas: nothing is missed.
Where only hours and days are kept any more, a window begins and ends at whole hours, outward.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import text

from engine.store import histogram
from engine.store.arrays import fetch_arrays
from engine.store.database import ReadSession
from engine.store.repositories.rollups import COUNTS, METRICS, POSITIONS, REALS, TIERS

DIMENSIONS = frozenset({"policy_version", "arm", "traffic_class", "replica_id"})
ORIGIN = datetime(2000, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
"""The finest that rollups know."""
KEPT_LONG = ("hour", "day")
"""Tiers that outlive the traces."""
_SUMMED = tuple(name for name in REALS if name != "e2e_s")  # which old rows do not know
_SUMS, _HISTOGRAMS = ("rollups", "rollup_deltas"), ("rollup_histograms", "rollup_delta_histograms")
"""Name of the tiers' tables up to the tier, and that of the deltas."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A window of time [since, until) and what of it: None means all. ``versions`` are any of some, beside the one.

    ``hours_before`` is set by ``resolved``: what began earlier is known by the hour and day only.
    """

    since: datetime
    until: datetime
    traffic_class: str | None = None
    arm: str | None = None
    version: int | None = None
    replica: str | None = None
    versions: tuple[int, ...] | None = None
    hours_before: datetime | None = None

    def before(self) -> Slice:
        """The window of the same length that ends where this one begins."""
        return replace(self, since=self.since - (self.until - self.since), until=self.since, hours_before=None)

    def bin(self, most: int = 90) -> timedelta:
        """A round bin width that gives at most so many bins; never under the finest rollup of the whole window."""
        seconds = (self.until - self.since).total_seconds() / most
        if self.hours_before is not None:
            seconds = max(seconds, HOUR.total_seconds())
        rounds = (60, 120, 180, 300, 600, 1_200, 1_800, 3_600, 7_200, 10_800, 14_400, 86_400)
        return timedelta(seconds=next((r for r in rounds if r >= seconds), rounds[-1]))

    def by_minutes(self) -> tuple[Slice | None, list[Slice]]:
        """The whole minutes of it, which rollups know, and what is left at its ends, which only the traces do."""
        first, last = self.since + (ORIGIN - self.since) % MINUTE, self.until - (self.until - ORIGIN) % MINUTE
        if first >= last:
            return None, [self]
        ends = [replace(self, until=first), replace(self, since=last)]
        return replace(self, since=first, until=last), [end for end in ends if end.since < end.until]

    def covered_by(self, width: timedelta | None) -> list[tuple[str, datetime, datetime]]:
        """(tier, begin, end) of pieces that cover the window once: the coarsest tier that the bins allow in the middle,
        finer ones at its ragged ends."""
        tiers = [tier for tier, (row, _) in TIERS.items() if width is None or width % row == timedelta(0)]
        if self.hours_before is None:
            return _cover(self.since, self.until, tiers)
        middle = min(self.hours_before, self.until)
        kept = [tier for tier in tiers if tier in KEPT_LONG] or list(KEPT_LONG[:1])
        return [*_cover(self.since, middle, kept), *_cover(middle, self.until, tiers)]


def _cover(since: datetime, until: datetime, tiers: Sequence[str]) -> list[tuple[str, datetime, datetime]]:
    """A row belongs where it begins, so the finest tier takes the ends as they are."""
    *finer, coarsest = tiers
    if since >= until or not finer:
        return [(coarsest, since, until)] if since < until else []
    row = TIERS[coarsest][0]
    first, last = since + (ORIGIN - since) % row, until - (until - ORIGIN) % row
    if last - first < row:
        return _cover(since, until, finer)
    return [*_cover(since, first, finer), (coarsest, first, last), *_cover(last, until, finer)]


@dataclass(frozen=True, slots=True)
class Grouped:
    """Histograms per group: ``keys`` name the groups (time bin first, where there are bins), in order."""

    names: tuple[str, ...]
    keys: list[tuple[Any, ...]]
    table: histogram.Table


def resolved(session: ReadSession, part: Slice) -> Slice:
    """The slice as the store can still tell it: where finer rollups are past their retention it begins, and ends, at
    whole hours, outward."""
    if part.hours_before is not None:
        return part
    if "kept" not in session.info:  # a panel asks for many things of one slice
        session.info["kept"] = session.execute(text(_KEPT)).one()
    by_hour, by_minute = session.info["kept"]
    finer = by_minute if by_minute is not None else part.until + HOUR
    if by_hour is None or part.since >= finer or by_hour >= finer:
        return part
    until = part.until + (ORIGIN - part.until) % HOUR if part.until < finer else part.until
    return replace(part, since=part.since - (part.since - ORIGIN) % HOUR, until=until, hours_before=finer)


def with_traces(session: ReadSession, part: Slice) -> Slice:
    """What of a slice may still have its traces: rollups outlive them."""
    known = resolved(session, part)
    if known.hours_before is None:
        return part
    return replace(part, since=min(max(part.since, known.hours_before), part.until))


def sums(
    session: ReadSession, part: Slice, by: Sequence[str] = (), width: timedelta | None = None
) -> list[dict[str, Any]]:
    """Sums per group and, with a ``width``, per time bin ("at"), oldest first."""
    part = resolved(session, part)
    columns = _columns(by, width)
    # Postgres sums bigint as numeric, which arrives as Decimal.
    totals = ", ".join(
        [
            *(f"CAST(sum({name}) AS bigint) AS {name}" for name in COUNTS),
            *(f"sum({name}) AS {name}" for name in _SUMMED),
        ]
    )
    source = _source(part, width, _SUMS, (*DIMENSIONS, *COUNTS, *_SUMMED))
    query = f"SELECT {_list(columns.values(), totals)} FROM {source} {_group(columns)}"
    rows = session.execute(text(query), _parameters(part, width)).mappings()
    return [dict(row) for row in rows if row["requests"] is not None]


def quantiles(
    session: ReadSession,
    part: Slice,
    metric: str,
    qs: Sequence[float],
    by: Sequence[str] = (),
    width: timedelta | None = None,
) -> list[dict[str, Any]]:
    """Quantiles (seconds; acceptance length as it is), as "q50", "q95", "q99.9"…, per group and time bin; within 1 %
    of those of the raw traces. Only requests that ended well count."""
    found = grouped(session, part, metric, by, width)
    names = [f"q{q * 100:g}" for q in qs]
    return [
        dict(zip(found.names, key, strict=True)) | dict(zip(names, values, strict=True))
        for key, values in zip(found.keys, found.table.quantiles(qs).tolist(), strict=True)
    ]


def buckets(
    session: ReadSession, part: Slice, metric: str, width: timedelta | None = None, by: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Rows of (time bin, group, bucket, n) for heat maps and distributions; empty buckets are left out."""
    found = grouped(session, part, metric, by, width)
    return [
        dict(zip(found.names, found.keys[row], strict=True))
        | {"bucket": found.table.first + int(column), "n": int(found.table.counts[row, column])}
        for row, column in zip(*found.table.counts.nonzero(), strict=True)
    ]


def grouped(
    session: ReadSession, part: Slice, metric: str, by: Sequence[str] = (), width: timedelta | None = None
) -> Grouped:
    """The histograms of a metric per group and time bin.

    The arrays are merged here: SQL would unnest every bucket of every row into a row of its own.
    """
    if metric not in METRICS:
        raise ValueError(f"no histogram of {metric!r}; there are {sorted(METRICS)}")
    columns = _columns(by, width)
    part = resolved(session, part)
    source = _source(part, width, _HISTOGRAMS, (*DIMENSIONS, "idx", "cnt"), " AND metric = :metric")
    query = f"SELECT {_list(columns.values(), 'idx, cnt')} FROM {source}"
    rows = fetch_arrays(session, query, _parameters(part, width) | {"metric": metric})
    places: dict[tuple[Any, ...], int] = {}
    groups = [places.setdefault(row[:-2], len(places)) for row in rows]
    order = sorted(places)
    rank = {places[key]: number for number, key in enumerate(order)}
    merged = histogram.table([rank[group] for group in groups], [row[-2:] for row in rows], len(order))
    return Grouped(tuple(columns), order, merged)


def positions(
    session: ReadSession, part: Slice, by: Sequence[str] = (), width: timedelta | None = None
) -> list[dict[str, Any]]:
    """Drafted and accepted per draft position (0-based), per group and time bin."""
    part = resolved(session, part)
    columns = _columns(by, width)
    query = f"""
        SELECT {_list(columns.values(), "p.place - 1 AS position")},
               CAST(sum(p.drafted) AS bigint) AS drafted, CAST(sum(coalesce(p.accepted, 0)) AS bigint) AS accepted
        FROM {_source(part, width, _SUMS, (*DIMENSIONS, *POSITIONS))},
             unnest(drafted_per_pos, accepted_per_pos) WITH ORDINALITY AS p (drafted, accepted, place)
        {_group([*columns, "position"])}
    """
    return [dict(row) for row in session.execute(text(query), _parameters(part, width)).mappings()]


def known(session: ReadSession, part: Slice) -> dict[str, list[Any]]:
    """The classes, arms, versions and replicas that have traffic in the window: what the filters offer."""
    part = resolved(session, part)
    names = ("traffic_class", "arm", "policy_version", "replica_id")
    query = f"SELECT DISTINCT {', '.join(names)} FROM {_source(part, None, _SUMS, names)}"
    rows = session.execute(text(query), _parameters(part, None)).all()
    plural = ("classes", "arms", "versions", "replicas")
    return {name: sorted({row[place] for row in rows}) for place, name in enumerate(plural)}


def leading(session: ReadSession, part: Slice, most: int) -> list[tuple[int, int]]:
    """(version, requests) of the versions with the most requests in the window, most first."""
    part = resolved(session, part)
    source = _source(part, None, _SUMS, ("policy_version", "requests"))
    query = f"""
        SELECT policy_version, CAST(sum(requests) AS bigint) FROM {source}
        GROUP BY 1 HAVING sum(requests) > 0 ORDER BY 2 DESC, 1 DESC LIMIT :most"""
    rows = session.execute(text(query), _parameters(part, None) | {"most": most})
    return [(version, requests) for version, requests in rows]


def first_window(
    session: ReadSession, since: datetime | None, width: timedelta, version: int | None = None
) -> datetime | None:
    """The start of the first window of ``width`` (whole ten minutes) with traffic (of a version), at ``since`` or
    later."""
    part = "WHERE at >= coalesce(:since, timestamptz '-infinity')"
    part += "" if version is None else " AND policy_version = :version"
    query = f"""
        SELECT date_bin(:width, min(at), timestamptz '2000-01-01 00:00:00Z') FROM (
            SELECT min(at) AS at FROM rollups_ten_minutes {part} UNION ALL SELECT min(at) FROM rollup_deltas {part}
        ) AS first"""
    values = {"width": width, "since": since} | ({} if version is None else {"version": version})
    return session.scalar(text(query), values)


def newest(session: ReadSession) -> datetime | None:
    """When the newest trace began: how old what a page shows is."""
    return session.scalar(text("SELECT max(started_at) FROM traces"))


_KEPT = """
    SELECT (SELECT min(at) FROM rollups_hour),
           (SELECT date_trunc('day', min(at), 'UTC') FROM rollups_ten_minutes)"""
"""The oldest hour, and the UTC day from which all is known by the minute: whole days go, ten minutes before minutes."""


def _source(part: Slice, width: timedelta | None, tables: tuple[str, str], names: Iterable[str], also: str = "") -> str:
    """A relation over tiers and deltas that covers the window once; ``at`` is the start of a row."""
    merged, deltas = tables
    wanted = ", ".join(["at", *sorted(names)])
    rest = _filters(part) + also
    branches = [f"SELECT {wanted} FROM {deltas} WHERE at >= :since AND at < :until{rest}"]
    for place, (tier, _, _) in enumerate(part.covered_by(width)):
        branches.append(f"SELECT {wanted} FROM {merged}_{tier} WHERE at >= :b{place} AND at < :e{place}{rest}")
    return f"({' UNION ALL '.join(branches)}) AS rollup"


def _columns(by: Sequence[str], width: timedelta | None) -> dict[str, str]:
    """Result name → SQL, of what is grouped by. Only known names reach the statement."""
    if unknown := set(by) - DIMENSIONS:
        raise ValueError(f"cannot group by {sorted(unknown)}; there are {sorted(DIMENSIONS)}")
    at = {"at": "date_bin(:width, at, timestamptz '2000-01-01 00:00:00Z') AS at"} if width else {}
    return at | {name: name for name in by}


def _list(columns: Iterable[str], rest: str) -> str:
    return ", ".join([*columns, rest])


def _group(columns: Collection[str]) -> str:
    """Group and order by the first columns of the list, by their number."""
    if not columns:
        return ""
    names = ", ".join(str(position) for position in range(1, len(columns) + 1))
    return f"GROUP BY {names} ORDER BY {names}"


def _filters(part: Slice) -> str:
    return "".join(
        f" AND {clause}"
        for value, clause in (
            (part.traffic_class, "traffic_class = :traffic_class"),
            (part.arm, "arm = :arm"),
            (part.version, "policy_version = :version"),
            (part.replica, "replica_id = :replica"),
            (part.versions, "policy_version = ANY(:versions)"),
        )
        if value is not None
    )


def _parameters(part: Slice, width: timedelta | None) -> dict[str, Any]:
    values = {
        "since": part.since,
        "until": part.until,
        "traffic_class": part.traffic_class,
        "arm": part.arm,
        "version": part.version,
        "replica": part.replica,
        "versions": None if part.versions is None else list(part.versions),
        "width": width,
    }
    for place, (_, begin, end) in enumerate(part.covered_by(width)):
        values[f"b{place}"], values[f"e{place}"] = begin, end
    return {name: value for name, value in values.items() if value is not None}
