"""Versions side by side: what each did in a window, with intervals, and how it moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.store import histogram
from engine.store.database import ReadSession
from engine.store.intervals import Estimate, quantile_ranks, ratio
from engine.store.panels import traffic
from engine.store.panels.traffic import Rows
from engine.store.repositories import overview
from engine.store.repositories.overview import Slice

BY = ("policy_version",)
SHOWN = 50
"""Versions of one answer, those with the most requests: what a page and a person can take in."""
DRAWN = 8
"""Lines of one chart."""
BINS = 30
QUANTILES = {"e2e": (0.5, 0.95), "ttft": (0.5,), "tpot": (0.5,)}
RATIOS = {
    "acceptance_length": ("accepted", "steps"),
    "acceptance_rate": ("accepted", "drafted"),
    "decode_tokens_s": ("decoded", "decode_s"),
    "error_rate": ("errors", "requests"),
    "goodput_share": ("good", "requests"),
}


def among(session: ReadSession, part: Slice, most: int = SHOWN, also: Sequence[int] = ()) -> Slice:
    """The slice, of the ``most`` versions with the most requests where more served, and of ``also``."""
    if part.version is not None or part.versions is not None:
        return part
    found = overview.leading(session, part, most + 1)
    if len(found) <= most:
        return part
    return replace(part, versions=tuple(sorted({*(version for version, _ in found[:most]), *also})))


def measured(session: ReadSession, part: Slice) -> Rows:
    """One row a version: totals as everywhere, and for what can be compared also NAME_low and NAME_high (95 %).

    Ratios have their time bins as the unit, percentiles (ms) their order statistics.
    """
    part = among(session, part)
    rows = traffic.totals(session, part, BY, ("e2e", "ttft", "tpot"))
    width = traffic.bin_width(session, part, traffic.MOST)
    binned: dict[int, list[dict[str, Any]]] = {}
    for one in overview.sums(session, part, BY, width):
        one["decoded"] = max(one["output_tokens"] - one["requests"], 0)
        binned.setdefault(one["policy_version"], []).append(one)
    for row in rows:
        bins = binned.get(row["policy_version"], [])
        for name, (over, under) in RATIOS.items():
            found = ratio([one[over] for one in bins], [one[under] for one in bins])
            if found is not None and name == "acceptance_length":
                found = found.shifted(1.0)
            _put(row, name, found)
    for metric, qs in QUANTILES.items():
        _bound_quantiles(session, part, rows, metric, qs)
    return rows


def trends(session: ReadSession, part: Slice) -> Rows:
    """Requests, acceptance length, p50 and p95 (ms) over time by version, in few bins: what a sparkline shows."""
    return traffic.over_time(session, among(session, part), BY, ("e2e",), BINS)


def _bound_quantiles(session: ReadSession, part: Slice, rows: Rows, metric: str, qs: Sequence[float]) -> None:
    found = overview.grouped(session, part, metric, BY)
    counts = {key[0]: found.table.counts[number : number + 1] for number, key in enumerate(found.keys)}
    for row in rows:
        mine = counts.get(row["policy_version"])
        for q in qs:
            name = f"{metric}_p{q * 100:g}"
            value, ranks = row.get(name), quantile_ranks(q, 0 if mine is None else int(mine.sum()))
            if mine is None or value is None or ranks is None:
                _put(row, name, None)
                continue
            low, high = (replace(found.table, counts=mine).quantiles(ranks) * 1e3)[0].tolist()
            # A bucket stands for all values in it: the bounds are its edges, also where both are in the same one.
            _put(row, name, Estimate(value, low / (1 + histogram.ALPHA), high / (1 - histogram.ALPHA)))


def _put(row: dict[str, Any], name: str, found: Estimate | None) -> None:
    row[f"{name}_low"] = found.low if found is not None else None
    row[f"{name}_high"] = found.high if found is not None else None
