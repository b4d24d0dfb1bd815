"""What a rollout waits for: the guard table, and how many more requests until a guard can decide. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import ceil, exp, log
from typing import Any

from engine.contracts import CANARY, CONTROL, Verdict
from engine.rollout import statistics
from engine.rollout.guards import Latency, RolloutSpec, TokensPerStep
from engine.rollout.records import GuardResult
from engine.rollout.statistics import Difference

FAR = 10_000_000
"""Requests beyond which nobody waits."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """``requests`` more per arm until the guard says ``verdict`` if things stay as they look; None: not in sight."""

    verdict: Verdict
    requests: int | None
    minutes: float | None

    def __str__(self) -> str:
        if self.requests is None:
            return (
                "stays undecided at this difference" if self.verdict is Verdict.PASS else "no sign against the canary"
            )
        if self.requests == 0:
            return f"{self.verdict.value} now"
        when = f" (about {self.minutes:,.0f} min)" if self.minutes is not None else ""
        return f"needs about {self.requests:,} more requests per arm{when} to {self.verdict.value}"


def results(tree: Mapping[str, Any]) -> list[GuardResult]:
    """The guard table of a stored decision."""
    return [GuardResult(**{**guard, "verdict": Verdict(guard["verdict"])}) for guard in tree.get("guards", [])]


def per_second(tree: Mapping[str, Any], began: datetime, decided: datetime) -> float:
    """Requests a second that the slower arm got in the present stage; 0 where nothing is known."""
    staged = {
        s["arm"]: s["stage_requests"] for s in tree.get("inputs", {}).get("segments", []) if s["traffic_class"] is None
    }
    seconds = (decided - began).total_seconds()
    return min(staged.get(CANARY, 0), staged.get(CONTROL, 0)) / seconds if seconds > 0 else 0.0


def per_key(tree: Mapping[str, Any]) -> float:
    """Requests that an assignment key brought so far; 1 where nothing is known."""
    whole = [s for s in tree.get("inputs", {}).get("segments", []) if s["traffic_class"] is None]
    return max((s["requests"] / s["keys"] for s in whole if s["keys"]), default=1.0)


def outlook(spec: RolloutSpec, guard: GuardResult, rate: float, requests_per_key: float = 1.0) -> Outlook:
    """Until a guard decides, were the present estimate the truth.

    Tokens per step and latencies stand on keys, events on requests.
    """
    if guard.verdict is Verdict.FAIL:
        return Outlook(Verdict.FAIL, 0, 0.0)
    n = min(guard.n_canary, guard.n_control)
    verdict, more = Verdict.FAIL, None  # type: Verdict, int | None
    test = spec.tokens_per_step()
    if guard.guard == TokensPerStep.kind and test is not None:
        verdict, more = _tokens_per_step(spec, test, guard, n)
        more = ceil(more * requests_per_key) if more is not None else None
    elif guard.verdict is Verdict.INSUFFICIENT and n < spec.min_requests:
        verdict, more = Verdict.PASS, spec.min_requests - n
    elif guard.log_e is not None and guard.limit is not None and guard.log_e > 0 and n:
        more = ceil(n * (guard.limit / guard.log_e - 1.0))  # evidence grows in proportion to what it stands on
    if more is not None and any(isinstance(g, Latency) and g.name == guard.guard for g in spec.guards):
        more = ceil(more * requests_per_key)
    if more is not None and more > FAR:
        more = None
    return Outlook(verdict, more, more / rate / 60.0 if more is not None and rate > 0 else None)


def _tokens_per_step(spec: RolloutSpec, test: TokensPerStep, guard: GuardResult, n: int) -> tuple[Verdict, int | None]:
    if guard.verdict is Verdict.PASS:
        return Verdict.PASS, 0
    if guard.low is None or guard.high is None or guard.canary is None or guard.control is None or not n:
        return Verdict.PASS, max(0, test.min_requests - n)
    alpha = exp(-guard.limit) if guard.limit else spec.guard_alpha()  # less of it is left after the promotion
    rho = statistics.tuned_rho(test.horizon, alpha)
    deviation = (guard.high - guard.low) / 2.0 / float(statistics.half_width(Difference(0.0, 1.0, n), rho, alpha))
    difference = guard.canary - guard.control
    enough = difference + test.max_drop * guard.control
    passing = statistics.tuned_rho(test.horizon, test.pass_alpha)
    reached = n
    while reached <= FAR:
        then = Difference(difference, deviation * (n / reached) ** 0.5, reached)
        if enough > 0 and float(statistics.half_width(then, passing, test.pass_alpha)) < enough:
            return Verdict.PASS, reached - n
        if difference < 0 and float(statistics.log_e_below(then, 0.0, rho)) >= -log(alpha):
            return Verdict.FAIL, reached - n
        reached = max(reached + 5, int(reached * 1.05))
    return Verdict.PASS, None


def lines(spec: RolloutSpec, guards: Sequence[GuardResult], rate: float, requests_per_key: float = 1.0) -> list[str]:
    """The guard table as text."""
    rows = [("verdict", "guard", "segment", "n canary/control", "canary", "control", "interval", "log E/limit", "")]
    for guard in guards:
        where = guard.segment + (f" (worst {guard.worst})" if guard.worst and guard.worst != guard.segment else "")
        interval = f"{guard.low:+.3f} to {guard.high:+.3f}" if guard.low is not None and guard.high is not None else ""
        evidence = f"{guard.log_e:.2f}/{guard.limit:.2f}" if guard.log_e is not None and guard.limit is not None else ""
        told = guard.log_e is not None and guard.guard != "srm" and guard.verdict is not Verdict.FAIL
        said = str(outlook(spec, guard, rate, requests_per_key)) if told else guard.reason
        n = f"{guard.n_canary:,}/{guard.n_control:,}"
        rows.append(
            (guard.verdict.value, guard.guard, where, n, _value(guard.canary), _value(guard.control), interval,
             evidence, said)
        )  # fmt: skip
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]) - 1)]
    return ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
