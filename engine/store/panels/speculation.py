"""How well drafting does: by version, class and position, per request, and against what it costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from engine.store import histogram
from engine.store.database import ReadSession
from engine.store.panels import traffic
from engine.store.panels.traffic import Rows
from engine.store.repositories import overview
from engine.store.repositories.overview import Slice


def positions(session: ReadSession, part: Slice, by: Sequence[str] = ("policy_version",)) -> Rows:
    """Unconditional acceptance by draft position (0-based): accepted there / verify steps that drafted at all."""
    rows = overview.positions(session, part, by)
    most: dict[tuple[Any, ...], int] = defaultdict(int)
    for row in rows:
        group = tuple(row[name] for name in by)
        most[group] = max(most[group], row["drafted"])
    for row in rows:
        drafted = most[tuple(row[name] for name in by)]
        row["acceptance"] = row["accepted"] / drafted if drafted else None
    return rows


def acceptance_over_time(session: ReadSession, part: Slice, by: Sequence[str] = ("policy_version",)) -> Rows:
    """Acceptance rate and length, draft length and costs per time bin and group."""
    return traffic.over_time(session, part, by, latencies=())


def distribution(session: ReadSession, part: Slice, by: Sequence[str] = ("policy_version",)) -> Rows:
    """Requests by their own acceptance length (1 + accepted / steps), as log buckets of 2 %."""
    return [
        {name: row[name] for name in by}
        | {
            "acceptance_length": min(histogram.value(row["bucket"]), histogram.upper(row["bucket"])),
            "requests": row["n"],
        }
        for row in overview.buckets(session, part, "acceptance_length", None, by)
    ]


def cost(session: ReadSession, part: Slice) -> Rows:
    """What a verify step takes and brings, per version and class, beside plain decoding.

    ``gain`` is plain decoding's time over what was spent: by the engine's measured step costs where it knew them, else
    from draft plus verify time (``step_ms``) and the time per token of versions that drafted nothing in the same class
    (``plain_ms``). Drafting pays where ``acceptance_length`` exceeds ``break_even``, the cost of a step in plain steps.
    """
    rows = [row for row in traffic.totals(session, part, ("policy_version", "traffic_class"), ()) if row["steps"]]
    plain: dict[str, list[float]] = {}
    for row in rows:
        if row["drafted"] == 0:
            sums = plain.setdefault(row["traffic_class"], [0.0, 0.0])
            sums[0] += row["verify_s"] * 1e3
            sums[1] += row["steps"]
    for row in rows:
        row["step_ms"] = row["draft_step_ms"] + row["verify_step_ms"]
        known = plain.get(row["traffic_class"])
        row["plain_ms"] = known[0] / known[1] if known else None
        row["gain"] = row["observed_gain"]
        if row["gain"] is None and row["plain_ms"]:
            row["gain"] = row["acceptance_length"] * row["plain_ms"] / row["step_ms"]
        row["break_even"] = row["acceptance_length"] / row["gain"] if row["gain"] else None
    return rows


def alarm_band(session: ReadSession, part: Slice, width: timedelta = timedelta(days=7)) -> tuple[float, float] | None:
    """The acceptance length that 0.5 % and 99.5 % of the requests of the week before stayed under; None without any."""
    before = Slice(part.since - width, part.since, part.traffic_class, part.arm, part.version, part.replica)
    found = overview.quantiles(session, before, "acceptance_length", (0.005, 0.995))
    if not found or found[0]["q0.5"] != found[0]["q0.5"]:
        return None
    return found[0]["q0.5"], found[0]["q99.5"]
