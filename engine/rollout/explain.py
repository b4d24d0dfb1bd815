"""What a rollout waits for: the guard table, and how many more requests until a guard can decide. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import ceil, exp, isfinite, log
from typing import Any

from engine.contracts import CANARY, CONTROL, Verdict
from engine.rollout import statistics
from engine.rollout.guards import Latency, RolloutSpec, SampleRatio, TokensPerStep
from engine.rollout.records import GuardResult
from engine.rollout.statistics import Difference
from engine.rollout.verdict import LEANS

FAR = 10_000_000
"""Requests beyond which nobody waits."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """``requests`` more per arm until the guard says ``verdict`` if things stay as they look; None: not in sight.

    ``leaning``: the class whose evidence against the canary keeps the last step from its promotion (``verdict.LEANS``).
    """

    verdict: Verdict
    requests: int | None
    minutes: float | None
    leaning: str = ""

    def __str__(self) -> str:
        when = f" (about {self.minutes:,.0f} min)" if self.minutes is not None else ""
        if self.requests == 0:
            said = f"{self.verdict.value} now"
        elif self.requests is not None:
            said = f"needs about {self.requests:,} more requests per arm{when} to {self.verdict.value}"
        elif self.verdict is Verdict.PASS:
            said = "stays undecided at this difference"
        else:
            said = "" if self.leaning else "no sign against the canary"
        leans = f"leans against the canary in {self.leaning}, which keeps it from promotion" if self.leaning else ""
        return "; ".join(part for part in (said, leans) if part)


def results(tree: Mapping[str, Any]) -> list[GuardResult]:
    """The guard table of a stored decision."""
    return [GuardResult(**{**guard, "verdict": Verdict(guard["verdict"])}) for guard in tree.get("guards", [])]


def began(status: Mapping[str, Any], otherwise: datetime) -> datetime:
    """When the newest stage of a stored status began, or ``otherwise``."""
    newest = status.get("watch") or next(reversed(status.get("stages") or ()), None) or status.get("shadow")
    return datetime.fromisoformat(newest["began"]) if newest else otherwise


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

    Tokens per step and latencies stand on keys, events on requests. 0 requests are only those of a verdict that stands.
    """
    if guard.verdict is Verdict.FAIL:
        return Outlook(Verdict.FAIL, 0, 0.0)
    n = min(guard.n_canary, guard.n_control)
    verdict, more = Verdict.FAIL, None  # type: Verdict, float | None
    leaning, test = _leaning(guard), spec.tokens_per_step()
    if guard.guard == TokensPerStep.kind and test is not None and (not leaning or guard.verdict is Verdict.PASS):
        verdict, more = _tokens_per_step(spec, test, guard, n)
    elif guard.verdict is Verdict.INSUFFICIENT and n < spec.min_requests:
        verdict, more = Verdict.PASS, spec.min_requests - n
    elif guard.log_e is not None and guard.limit is not None and guard.log_e > 0 and n:
        more = n * (guard.limit / guard.log_e - 1.0)  # evidence grows in proportion to what it stands on
    if more is not None and any(isinstance(g, TokensPerStep | Latency) and g.name == guard.guard for g in spec.guards):
        more *= requests_per_key
    requests = ceil(more) if more is not None and more <= FAR else None
    minutes = requests / rate / 60.0 if requests is not None and rate > 0 else None
    return Outlook(verdict, requests, minutes, leaning)


def _leaning(guard: GuardResult) -> str:
    if guard.lean is None or guard.lean <= LEANS:
        return ""
    return f"class {guard.worst}" if guard.worst else "all classes together"


def needed(spec: RolloutSpec, guard: GuardResult, rate: float, requests_per_key: float = 1.0) -> str:
    """What a guard still needs, in words; empty where more requests are not what it waits for."""
    if guard.log_e is None or guard.guard == SampleRatio.kind or guard.verdict is Verdict.FAIL:
        return ""
    return str(outlook(spec, guard, rate, requests_per_key))


def _tokens_per_step(spec: RolloutSpec, test: TokensPerStep, guard: GuardResult, n: int) -> tuple[Verdict, int | None]:
    if guard.verdict is Verdict.PASS:
        return Verdict.PASS, 0
    low, high = guard.low, guard.high
    if low is None or high is None or not isfinite(high - low) or guard.canary is None or guard.control is None:
        # too few keys, or keys that do not differ at all, such as where nothing is ever accepted
        return Verdict.PASS, test.min_requests - n if n < test.min_requests else None
    alpha = exp(-guard.limit) if guard.limit else spec.guard_alpha()  # less of it is left after the promotion
    rho = statistics.tuned_rho(test.horizon, alpha)
    deviation = (high - low) / 2.0 / float(statistics.half_width(Difference(0.0, 1.0, n), rho, alpha))
    difference = guard.canary - guard.control
    enough = difference + test.max_drop * guard.control
    passing = statistics.tuned_rho(test.horizon, test.pass_alpha)
    reached = max(n, test.min_requests)
    while reached <= FAR:
        then = Difference(difference, deviation * (n / reached) ** 0.5, reached)
        if enough > 0 and float(statistics.half_width(then, passing, test.pass_alpha)) < enough:
            return Verdict.PASS, max(1, reached - n)
        if difference < 0 and float(statistics.log_e_below(then, 0.0, rho)) >= -log(alpha):
            return Verdict.FAIL, max(1, reached - n)
        reached = max(reached + 5, int(reached * 1.05))
    return Verdict.PASS, None


def lines(spec: RolloutSpec, guards: Sequence[GuardResult], rate: float, requests_per_key: float = 1.0) -> list[str]:
    """The guard table as text."""
    rows = [("verdict", "guard", "segment", "n canary/control", "canary", "control", "interval", "log E/limit", "")]
    for guard in guards:
        where = guard.segment + (f" (worst {guard.worst})" if guard.worst and guard.worst != guard.segment else "")
        interval = f"{guard.low:+.3f} to {guard.high:+.3f}" if guard.low is not None and guard.high is not None else ""
        evidence = f"{guard.log_e:.2f}/{guard.limit:.2f}" if guard.log_e is not None and guard.limit is not None else ""
        said = needed(spec, guard, rate, requests_per_key) or guard.reason
        n = f"{guard.n_canary:,}/{guard.n_control:,}"
        rows.append(
            (guard.verdict.value, guard.guard, where, n, _value(guard.canary), _value(guard.control), interval,
             evidence, said)
        )  # fmt: skip
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]) - 1)]
    return ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
