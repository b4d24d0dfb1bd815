"""Traffic, latency and acceptance: totals and over time, with the ratios made of the counts.

Durations are milliseconds, as panels show them; rates are per second of the window or of the bin.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from engine.store import histogram
from engine.store.database import ReadSession
from engine.store.repositories import overview
from engine.store.repositories.overview import Slice

Rows = list[dict[str, Any]]
QS = (0.5, 0.9, 0.95, 0.99, 0.999)
LATENCIES = ("e2e", "ttft", "tpot", "queue")
PER_BIN = 25
"""Bins are wide enough for some so many requests each: percentiles of fewer say more about chance."""
MOST = 90
"""Time bins of a chart."""
JOINED = 8
"""Histogram buckets in one row of the heat map: 17 %."""


def totals(session: ReadSession, part: Slice, by: Sequence[str] = (), latencies: Sequence[str] = LATENCIES) -> Rows:
    """One row a group: sums, ratios, and p50 to p99.9 of each latency as "e2e_p95"…, ms."""
    part = overview.resolved(session, part)
    rows = overview.sums(session, part, by)
    seconds = (part.until - part.since).total_seconds()
    found = [with_ratios(row, seconds) for row in rows if row["requests"]]
    return _with_quantiles(session, part, found, latencies, by, None)


def over_time(
    session: ReadSession,
    part: Slice,
    by: Sequence[str] = (),
    latencies: Sequence[str] = LATENCIES,
    most: int = MOST,
    now: datetime | None = None,
) -> Rows:
    """The same per time bin ("at", its start, and "width_s"); bins without traffic are absent.

    A last bin that has hardly begun is left out, it says more about chance than about the service.
    """
    part = overview.resolved(session, part)
    width = bin_width(session, part, most)
    here = now or datetime.now(UTC)
    found = []
    for row in overview.sums(session, part, by, width):
        begin = max(row["at"], part.since.replace(second=0, microsecond=0))
        seconds = (min(row["at"] + width, part.until, here) - begin).total_seconds()
        found.append(with_ratios(row, max(seconds, 1.0)) | {"width_s": width.total_seconds(), "seconds": seconds})
    whole = [row for row in found if row["seconds"] >= width.total_seconds() / 2]
    return _with_quantiles(session, part, whole or found, latencies, by, width)


def heat(session: ReadSession, part: Slice, metric: str = "e2e", most: int = 60) -> Rows:
    """(at, width_s, low_ms, high_ms, requests): requests by time and latency, buckets joined by eights."""
    part = overview.resolved(session, part)
    width = bin_width(session, part, most)
    joined: dict[tuple[datetime, int], int] = {}
    for row in overview.buckets(session, part, metric, width):
        at = row["at"], row["bucket"] // JOINED * JOINED
        joined[at] = joined.get(at, 0) + row["n"]
    return [
        {
            "at": at,
            "width_s": width.total_seconds(),
            "low_ms": histogram.upper(bucket - 1) * 1e3,
            "high_ms": histogram.upper(bucket - 1 + JOINED) * 1e3,
            "requests": n,
        }
        for (at, bucket), n in sorted(joined.items())
    ]


def bin_width(session: ReadSession, part: Slice, most: int) -> timedelta:
    """A round width that gives at most so many bins, and fewer where there is little traffic."""
    part = overview.resolved(session, part)
    rows = overview.sums(session, part)
    requests = rows[0]["requests"] if rows else 0
    return part.bin(max(24, min(most, requests // PER_BIN)))


def with_ratios(row: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Ratios are made here, of counts; None where there is nothing to divide by.

    ``acceptance_length`` is 1 + accepted / steps, bonus included; ``acceptance_rate`` accepted / drafted;
    ``draft_length`` drafted / steps, the K that was used; ``goodput_s`` requests within the objectives per second.
    ``cost_step_ms`` is what a step cost of the engine's time, without its neighbours' shares; ``observed_gain`` the
    cost of plain decoding over it, ``predicted_gain`` the same as K control saw it coming and ``expected_length`` the
    acceptance length that it expected; None where no step costs were known.
    """
    steps = row["steps"]
    accepted = _over(row["accepted"], steps)
    return row | {
        "requests_s": row["requests"] / seconds,
        "tokens_s": row["output_tokens"] / seconds,
        "goodput_s": row["good"] / seconds,
        "goodput_share": _over(row["good"], row["requests"]),
        "acceptance_length": None if accepted is None else 1 + accepted,
        "acceptance_rate": _over(row["accepted"], row["drafted"]),
        "draft_length": _over(row["drafted"], steps),
        "draft_step_ms": _over(row["draft_s"] * 1e3, steps),
        "verify_step_ms": _over(row["verify_s"] * 1e3, steps),
        "cost_step_ms": _over(row["cost_s"] * 1e3, steps),
        "observed_gain": _over(row["plain_s"], row["cost_s"]) if row["plain_s"] else None,
        "predicted_gain": _over(row["expected_plain_s"], row["expected_cost_s"]),
        "expected_length": 1 + row["expected_accepted"] / steps if steps and row["expected_accepted"] else None,
        "decode_tokens_s": _over(max(row["output_tokens"] - row["requests"], 0), row["decode_s"]),
        "error_rate": _over(row["errors"], row["requests"]),
        "retry_rate": _over(row["retries"], row["requests"]),
        "draft_share": _over(row["draft_s"], row["draft_s"] + row["verify_s"]),
    }


def _with_quantiles(
    session: ReadSession,
    part: Slice,
    rows: Rows,
    latencies: Sequence[str],
    by: Sequence[str],
    width: timedelta | None,
) -> Rows:
    names = [*(("at",) if width else ()), *by]
    for metric in latencies if rows else ():
        found = overview.quantiles(session, part, metric, QS, by, width)
        known = {tuple(row[name] for name in names): row for row in found}
        for row in rows:
            values = known.get(tuple(row[name] for name in names), {})
            for q in QS:
                value = values.get(f"q{q * 100:g}")
                row[f"{metric}_p{q * 100:g}"] = value * 1e3 if value is not None and value == value else None
    return rows


def _over(count: float, of: float) -> float | None:
    return count / of if of else None
