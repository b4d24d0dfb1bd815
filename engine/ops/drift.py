"""Looks for drift every few minutes and keeps the table of findings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime, timedelta

import numpy as np

from engine.contracts import ProposerKind
from engine.diagnosis import drift
from engine.store.database import Database, ReadSession
from engine.store.repositories import drift as found
from engine.store.repositories import overview, plans, policies
from engine.store.repositories.drift import Finding
from engine.store.repositories.overview import Slice

NOW = timedelta(hours=1)
REFERENCE = timedelta(hours=24)
"""The last hour is held against the day before it."""
FEW = 100
"""A class with fewer requests in either window is not compared."""
LEVEL = 0.999
"""Of one comparison of some twenty that are made at every look: 2 % false alarms over all of them."""
DEATHS = (timedelta(minutes=15), timedelta(hours=6))
"""Where nothing is accepted K control soon drafts but to probe, and it takes the longer one to see enough of that."""
DEATH_REQUESTS = 30
SLIDE_T = 4.0
WARM_UP = timedelta(minutes=1)
log = logging.getLogger(__name__)


def look(database: Database, now: datetime) -> bool:
    """Find, record, and say what is new in the log; there is never more to do at once."""
    with database.read() as session:
        current = list(findings(session, now))
    with database.write() as session:
        fresh = [row.detail for row in found.record(session, current, now)]
    for detail in fresh:
        log.warning("drift: %s", detail)
    return False


def findings(session: ReadSession, now: datetime) -> Iterator[Finding]:
    """Everything that has changed as of now."""
    yield from _input(session, now)
    plan = plans.latest(session)
    if plan is None:
        return
    since = plans.champion_since(session, plan) + WARM_UP
    if since < now:
        yield from _change_point(session, plan.champion, since, now)
        yield from _slide(session, plan.champion, since, now)
    yield from _dead(session, now)


def _input(session: ReadSession, now: datetime) -> Iterator[Finding]:
    before, current = Slice(now - NOW - REFERENCE, now - NOW), Slice(now - NOW, now)
    times = (current.since, now, before.since, before.until)
    for quantity in (*found.BINNED, found.TOKENS):
        reference, today = (found.binned(session, quantity, part.since, part.until) for part in (before, current))
        for traffic_class, counts in today.items():
            usual = reference.get(traffic_class, {})
            if min(sum(usual.values()), sum(counts.values())) < FEW:
                continue
            bins = sorted({*usual, *counts})
            shift = drift.psi([usual.get(b, 0.0) for b in bins], [counts.get(b, 0.0) for b in bins], LEVEL)
            if shift.is_drift:
                where = f" of {traffic_class}" if traffic_class else ""
                detail = f"{quantity}{where}: PSI {shift.psi:.2f}, chance reaches {shift.threshold:.2f}"
                sizes = (shift.psi, shift.psi, shift.threshold, shift.n)
                yield Finding("input", quantity, traffic_class or None, None, *times, *sizes, detail)
            if quantity.endswith("mix"):
                for member, share in drift.new_members(usual, counts).items():
                    name = f"{quantity.removesuffix(' mix')} {member}"
                    detail = f"{name}: {share * 100:.0f} % of the requests, hardly any the day before"
                    sizes = (share, share, drift.NEW_SHARE, int(counts[member]))
                    yield Finding("new_traffic", name, None, None, *times, *sizes, detail)


def _change_point(session: ReadSession, version: int, since: datetime, now: datetime) -> Iterator[Finding]:
    values, classes, times = found.acceptance(session, version, since, now, drift.IN_CONTROL)
    change = drift.change_point(values, classes)
    if not isinstance(change, drift.Change):
        return
    at = times[change.onset]
    word = "fell" if change.after < change.before else "rose"
    yield Finding(
        "change_point", "acceptance length", None, version, at, now, since, at, change.after - change.before,
        drift.ALARM_H, drift.ALARM_H, len(values) - change.onset,
        f"acceptance length of v{version} {word} from {1 + change.before:.2f} to {1 + change.after:.2f} "
        f"at {at:%b %d %H:%M}, the mix of classes taken out",
    )  # fmt: skip


def _slide(session: ReadSession, version: int, since: datetime, now: datetime) -> Iterator[Finding]:
    """Hourly accepted tokens per step, each class about its own mean, so that a change of mix is no slide."""
    rows = overview.sums(session, Slice(since, now, version=version), ("traffic_class",), timedelta(hours=1))
    rows = [row for row in rows if row["steps"] and row["at"] + timedelta(hours=1) <= now]
    if not rows:
        return
    whole = sum(row["steps"] for row in rows)
    overall = sum(row["accepted"] for row in rows) / whole
    means = {
        name: sum(r["accepted"] for r in rows if r["traffic_class"] == name)
        / sum(r["steps"] for r in rows if r["traffic_class"] == name)
        for name in {row["traffic_class"] for row in rows}
    }
    hours: dict[datetime, list[float]] = {}
    for row in rows:
        sums = hours.setdefault(row["at"], [0.0, 0.0])
        sums[0] += row["accepted"] - means[row["traffic_class"]] * row["steps"]
        sums[1] += row["steps"]
    begin = min(hours)
    x = np.array([(at - begin) / timedelta(hours=1) for at in sorted(hours)])
    y = np.array([overall + hours[at][0] / hours[at][1] for at in sorted(hours)])
    line = drift.slide(x, y, np.array([hours[at][1] for at in sorted(hours)]))
    if line is None or line.t < SLIDE_T or line.lost < drift.SLIDE * line.start:
        return
    start = max(begin, since)  # the first hour may have begun before
    quarter = (now - start) / 4  # what it has come to, beside what it came from
    yield Finding(
        "slow_slide", "acceptance length", None, version, now - quarter, now, start, start + quarter, -line.lost,
        line.t, SLIDE_T,
        sum(row["requests"] for row in rows),
        f"acceptance length of v{version} slid by {line.lost:.2f} in {x.max():.0f} h at a constant version",
    )  # fmt: skip


def _dead(session: ReadSession, now: datetime) -> Iterator[Finding]:
    """Of what serves at the moment: by the shorter window where enough was drafted in it, else by the longer one,
    unless some of the little that was drafted lately was accepted: it is alive again."""
    none = {v.version for v in policies.all_versions(session) if v.kind is ProposerKind.NONE}
    unjudged: set[tuple[int, str]] | None = None
    for length in DEATHS:
        part, rest = Slice(now - length, now), set[tuple[int, str]]()
        for row in overview.sums(session, part, ("policy_version", "traffic_class")):
            version, traffic_class = row["policy_version"], row["traffic_class"]
            healthy = row["requests"] - row["errors"]
            if version in none or (unjudged is not None and (version, traffic_class) not in unjudged):
                continue
            if healthy < DEATH_REQUESTS or row["drafted"] < drift.DEAD_DRAFTED:
                if row["accepted"] <= drift.DEAD * row["drafted"]:
                    rest.add((version, traffic_class))
            elif drift.is_dead(row["drafted"], row["accepted"]):
                yield Finding(
                    "silent_death", "acceptance length", traffic_class, version, part.since, now, part.since - length,
                    part.since, row["accepted"] / row["steps"], row["accepted"] / row["drafted"], drift.DEAD, healthy,
                    f"v{version} accepts nothing of {traffic_class}: acceptance length 1.00, {healthy:,} requests",
                )  # fmt: skip
        unjudged = rest
