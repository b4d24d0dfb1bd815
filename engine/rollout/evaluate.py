"""The guards, applied to what the traces say: a pure function of the specification and the counts.

A statistical guard collects one e-value from all classes together and one from each class, and judges their mean: valid
whatever their dependence, and one class that is ruined fails the whole and is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from math import exp, log, log1p

import numpy as np

from engine.contracts import Verdict
from engine.percent import percent
from engine.rollout import fuses, quantiles, statistics
from engine.rollout.arms import ALL, Arms
from engine.rollout.guards import (
    IN_SHADOW,
    CostFuse,
    Errors,
    Guard,
    Latency,
    LatencyFuse,
    Mismatches,
    MismatchFuse,
    RestartFuse,
    Retries,
    RolloutSpec,
    SampleRatio,
    Timeouts,
    TokensPerStep,
)
from engine.rollout.quantiles import Array
from engine.rollout.records import GuardResult
from engine.rollout.statistics import Difference, Moments
from engine.store.segments import Segment

OUTER = 2.8
"""How far a spacing looked to one side by the second rules."""


def evaluate(
    spec: RolloutSpec,
    segments: Sequence[Segment],
    restarts: Sequence[datetime] = (),
    now: datetime | None = None,
    watching: bool = False,
    in_shadow: bool = False,
) -> tuple[GuardResult, ...]:
    """The guard table, in the order of the specification. ``restarts``: when replicas started again meanwhile;
    ``watching``: the canary is champion already, and ``segments`` are what came after; ``in_shadow``: it has served
    nobody yet, ``segments`` are what it drafted on copies, and only guards ``IN_SHADOW`` judge.
    """
    arms, alpha = Arms.of(segments), spec.shadow_alpha() if in_shadow else spec.guard_alpha(watching)
    guards = [guard for guard in spec.guards if not in_shadow or guard.kind in IN_SHADOW]
    return tuple(_judged(guard, spec, alpha, arms, restarts, now) for guard in guards)


def _judged(
    guard: Guard,
    spec: RolloutSpec,
    alpha: float,
    arms: Arms,
    restarts: Sequence[datetime],
    now: datetime | None,
) -> GuardResult:
    match guard:
        case TokensPerStep():
            return _tokens_per_step(guard, alpha, arms)
        case Latency():
            return _latency(guard, spec, alpha, arms)
        case Errors() | Timeouts() | Retries() | Mismatches():
            return _events(guard, spec, alpha, arms)
        case LatencyFuse() | CostFuse():
            return fuses.ratio(guard, arms, fuses.FUSE_DEVIATIONS if spec.rules > 1 else 0.0)
        case MismatchFuse():
            return fuses.mismatch(guard, arms)
        case RestartFuse():
            return fuses.restarts(guard, arms, restarts, now)
        case SampleRatio():
            return fuses.sample_ratio(guard, arms)


def _tokens_per_step(guard: TokensPerStep, alpha: float, arms: Arms) -> GuardResult:
    canary, control = _moments(arms.canary), _moments(arms.control)
    rho, limit = statistics.tuned_rho(guard.horizon, alpha), -log(alpha)
    diff = statistics.difference(canary, control)
    known = np.minimum(canary.n, control.n) >= guard.min_requests
    each = np.where(known, statistics.log_e_below(diff, 0.0, rho), 0.0)
    log_e = statistics.log_mean(each[0], each[1:])
    failed = log_e >= limit
    at = arms.worst(each) if failed else 0
    width = float(statistics.half_width(_entry(diff, at), rho, alpha))
    line = GuardResult(
        guard.name,
        Verdict.INSUFFICIENT,
        "",
        arms.names[at],
        arms.canary[at].n,
        arms.control[at].n,
        float(canary.ratio[at]),
        float(control.ratio[at]),
        float(diff.estimate[at]) - width,
        float(diff.estimate[at]) + width,
        log_e,
        limit,
        worst=_worst(arms, each),
        lean=float(each.max()),
    )
    if failed:
        return replace(
            line,
            verdict=Verdict.FAIL,
            reason=f"{_where(line.segment)}the canary commits {line.canary:.3f} tokens per verify step, the control "
            f"{line.control:.3f}, over {line.n_canary} and {line.n_control} keys" + _worst_said(line),
        )
    if not known[0]:
        return replace(line, reason=f"needs {guard.min_requests} keys per arm with a verify step")
    least = _entry(statistics.difference(canary, control, 1.0 - guard.max_drop), 0)
    rho = statistics.tuned_rho(guard.horizon, guard.pass_alpha)
    if least.estimate - statistics.half_width(least, rho, guard.pass_alpha) > 0:
        better = line.low is not None and line.low > 0
        reason = "better than the control" if better else f"not worse than the control by {percent(guard.max_drop)}"
        return replace(line, verdict=Verdict.PASS, reason=reason)
    return replace(line, reason=f"not yet certain that the canary is less than {percent(guard.max_drop)} worse")


def _latency(guard: Latency, spec: RolloutSpec, alpha: float, arms: Arms) -> GuardResult:
    sums = arms.sums(guard.metric)
    rho, limit = statistics.tuned_rho(guard.horizon, alpha), -log(alpha)
    outer = OUTER if spec.rules == 2 else 0.0
    if guard.method == "certified":
        each = quantiles.certified(sums, guard.quantile, guard.margin)
    elif spec.rules > 2:
        each = statistics.log_e_of_distance(*quantiles.fast(sums, guard.quantile, guard.margin), rho)
    else:
        each = statistics.log_e_below(quantiles.spacing(sums, guard.quantile, guard.margin, outer), 0.0, rho)
    log_e = statistics.log_mean(each[0], each[1:])
    failed = log_e >= limit
    at = arms.worst(each) if failed else 0
    slow, usual = (arm[at].quantile(guard.metric, guard.quantile) for arm in (arms.canary, arms.control))
    one = _entry(quantiles.spacing(sums[:, [at]], guard.quantile, guard.margin, outer), 0)
    width = float(statistics.half_width(one, rho, alpha))
    middle = log1p(guard.margin) - float(one.estimate)  # log(canary / control)
    known = np.isfinite(width)
    line = GuardResult(
        guard.name,
        Verdict.PASS,
        f"not seen to be more than {percent(guard.margin)} slower",
        arms.names[at],
        round(sums[0, at, -1]),
        round(sums[1, at, -1]),
        slow,
        usual,
        exp(middle - width) - 1.0 if known and middle - width < 50 else None,
        exp(middle + width) - 1.0 if known and middle + width < 50 else None,
        log_e,
        limit,
        worst=_worst(arms, each),
        lean=float(each.max()),
    )
    if failed and slow is not None and usual is not None:
        reason = f"{_where(line.segment)}p{guard.quantile * 100:g} of {guard.metric} is {slow:.3g} s on the canary, "
        reason += f"{usual:.3g} s on the control, more than {percent(guard.margin)} slower"
        return replace(line, verdict=Verdict.FAIL, reason=reason + _worst_said(line))
    if min(line.n_canary, line.n_control) < spec.min_requests:
        return replace(line, verdict=Verdict.INSUFFICIENT, reason=f"needs {spec.min_requests} keys per arm")
    return line


def _events(
    guard: Errors | Timeouts | Retries | Mismatches, spec: RolloutSpec, alpha: float, arms: Arms
) -> GuardResult:
    limit = -log(alpha)
    met, usual = ([getattr(segment, guard.counted) for segment in arm] for arm in (arms.canary, arms.control))
    each = np.asarray(statistics.log_e_binomial(np.array(met), np.array(usual)))
    log_e = statistics.log_mean(each[0], each[1:])
    failed = log_e >= limit
    at = arms.worst(each) if failed else 0
    canary, control = arms.canary[at], arms.control[at]
    line = GuardResult(
        guard.name,
        Verdict.PASS,
        f"no more {guard.name} than the control",
        arms.names[at],
        canary.requests,
        control.requests,
        met[at],
        usual[at],
        log_e=log_e,
        limit=limit,
        worst=_worst(arms, each),
        lean=float(each.max()),
    )
    if failed:
        reason = f"{_where(line.segment)}{met[at]} keys met {guard.name} in {canary.requests} requests of the canary, "
        reason += f"{usual[at]} in {control.requests} of the control"
        if isinstance(guard, Errors) and canary.draft_error_keys:
            reason += f"; of the canary's {canary.draft_error_keys} were of its draft"
        return replace(line, verdict=Verdict.FAIL, reason=reason + _worst_said(line))
    if min(arms.canary[0].requests, arms.control[0].requests) < spec.min_requests:
        return replace(line, verdict=Verdict.INSUFFICIENT, reason=f"needs {spec.min_requests} requests per arm")
    return line


def _worst(arms: Arms, log_e: Array) -> str:
    """The class with the most evidence against the canary, where there is any."""
    at = arms.worst(log_e[1:]) + 1 if len(log_e) > 1 else 0
    return arms.names[at] if log_e[at] > 0 else ""


def _moments(segments: Sequence[Segment]) -> Moments:
    return Moments(*np.array([(s.n, s.x, s.y, s.xx, s.yy, s.xy) for s in segments], float).T)


def _entry(diff: Difference, at: int) -> Difference:
    return Difference(diff.estimate[at], diff.se[at], diff.pairs[at])


def _worst_said(line: GuardResult) -> str:
    return f", worst in class {line.worst}" if line.segment == ALL and line.worst else ""


def _where(segment: str) -> str:
    return "" if segment == ALL else f"in class {segment}: "
