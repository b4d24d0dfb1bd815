"""The guards, applied to what the traces say: a pure function of the specification and the counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import log

from engine.contracts import CANARY, CONTROL, Verdict
from engine.rollout import statistics
from engine.rollout.guards import Errors, LatencyFuse, RolloutSpec, SampleRatio, TokensPerStep
from engine.rollout.records import GuardResult
from engine.rollout.statistics import Moments
from engine.store.repositories.evidence import Segment

ALL = "all"
Pairs = Mapping[str, tuple[Segment, Segment]]  # segment name → (canary, control); ALL holds all classes together


def evaluate(spec: RolloutSpec, segments: Sequence[Segment]) -> tuple[GuardResult, ...]:
    """The guard table, in the order of the specification."""
    pairs = _pairs(segments)
    results = []
    for guard in spec.guards:
        match guard:
            case TokensPerStep():
                results.append(_tokens_per_step(guard, spec.guard_alpha(), pairs))
            case Errors():
                results.append(_errors(spec, pairs))
            case LatencyFuse():
                results.append(_fuse(guard, pairs))
            case SampleRatio():
                results.append(_sample_ratio(guard, pairs))
    return tuple(results)


def _tokens_per_step(guard: TokensPerStep, alpha: float, pairs: Pairs) -> GuardResult:
    """Mean of the e-values of all classes together and of each: one class that is ruined fails the whole."""
    rho, limit = statistics.tuned_rho(guard.horizon, alpha), -log(alpha)
    evidence = {ALL: 0.0}
    for name, (canary, control) in pairs.items():
        known = min(canary.n, control.n) >= guard.min_requests
        diff = statistics.difference(_moments(canary), _moments(control))
        evidence[name] = float(statistics.log_e_below(diff, 0.0, rho)) if known else 0.0
    log_e = statistics.log_mean(list(evidence.values()))
    failed = log_e >= limit
    segment = max(evidence, key=lambda name: evidence[name]) if failed else ALL
    canary, control = _arms(pairs, segment)
    line = _line(guard, alpha, segment, canary, control)
    line = replace(line, log_e=log_e, limit=limit)
    if failed:
        return replace(
            line,
            verdict=Verdict.FAIL,
            reason=f"{_where(segment)}the canary commits {line.canary:.3f} tokens per verify step, the control "
            f"{line.control:.3f}, over {line.n_canary} and {line.n_control} requests",
        )
    canary, control = _arms(pairs, ALL)
    if min(canary.n, control.n) < guard.min_requests:
        return replace(line, reason=f"needs {guard.min_requests} requests per arm with a verify step")
    least = _scaled(_moments(control), 1.0 - guard.max_drop)
    diff = statistics.difference(_moments(canary), least)
    rho = statistics.tuned_rho(guard.horizon, guard.pass_alpha)
    if diff.estimate - statistics.half_width(diff, rho, guard.pass_alpha) > 0:
        better = line.low is not None and line.low > 0
        reason = "better than the control" if better else f"not worse than the control by {guard.max_drop:.0%}"
        return replace(line, verdict=Verdict.PASS, reason=reason)
    return replace(line, reason=f"not yet certain that the canary is less than {guard.max_drop:.0%} worse")


def _line(guard: TokensPerStep, alpha: float, segment: str, canary: Segment, control: Segment) -> GuardResult:
    """Ratios and the one-sided bounds of their difference; INSUFFICIENT until somebody says otherwise."""
    diff = statistics.difference(_moments(canary), _moments(control))
    width = float(statistics.half_width(diff, statistics.tuned_rho(guard.horizon, alpha), alpha))
    estimate = float(diff.estimate)
    return GuardResult(
        guard.kind,
        Verdict.INSUFFICIENT,
        "",
        segment,
        canary.n,
        control.n,
        float(_moments(canary).ratio),
        float(_moments(control).ratio),
        estimate - width,
        estimate + width,
    )


def _errors(spec: RolloutSpec, pairs: Pairs) -> GuardResult:
    alpha = spec.guard_alpha()
    evidence = {ALL: 0.0}
    for name, (canary, control) in pairs.items():
        evidence[name] = float(statistics.log_e_binomial(canary.error_keys, control.error_keys))
    log_e, limit = statistics.log_mean(list(evidence.values())), -log(alpha)
    failed = log_e >= limit
    segment = max(evidence, key=lambda name: evidence[name]) if failed else ALL
    canary, control = _arms(pairs, segment)
    line = GuardResult(
        Errors.kind,
        Verdict.PASS,
        "no more errors than the control",
        segment,
        canary.keys,
        control.keys,
        canary.error_keys,
        control.error_keys,
        log_e=log_e,
        limit=limit,
    )
    if failed:
        reason = f"{_where(segment)}{canary.error_keys} of {canary.keys} keys met an error on the canary, "
        reason += f"{control.error_keys} of {control.keys} on the control"
        return replace(line, verdict=Verdict.FAIL, reason=reason)
    if min(canary.requests, control.requests) < spec.min_requests:
        return replace(line, verdict=Verdict.INSUFFICIENT, reason=f"needs {spec.min_requests} requests per arm")
    return line


def _fuse(guard: LatencyFuse, pairs: Pairs) -> GuardResult:
    canary, control = _arms(pairs, ALL)
    slow, usual = (getattr(arm, f"{guard.metric}_p95") for arm in (canary, control))
    line = GuardResult(
        guard.kind, Verdict.INSUFFICIENT, "", ALL, canary.requests, control.requests, slow, usual, limit=guard.ratio
    )
    if min(canary.requests, control.requests) < guard.min_requests or slow is None or not usual:
        return replace(line, reason=f"needs {guard.min_requests} requests per arm")
    if slow > guard.ratio * usual:
        reason = f"p95 of {guard.metric} is {slow:.3g} s on the canary, more than {guard.ratio:g} × the {usual:.3g} s"
        return replace(line, verdict=Verdict.FAIL, reason=reason + " of the control")
    return replace(line, verdict=Verdict.PASS, reason=f"p95 of {guard.metric} within {guard.ratio:g} × the control")


def _sample_ratio(guard: SampleRatio, pairs: Pairs) -> GuardResult:
    canary, control = _arms(pairs, ALL)
    log_e, limit = float(statistics.log_e_mismatch(canary.keys, control.keys)), -log(guard.alpha)
    line = GuardResult(
        guard.kind,
        Verdict.PASS,
        "both arms get equal traffic",
        ALL,
        canary.keys,
        control.keys,
        log_e=log_e,
        limit=limit,
    )
    if log_e >= limit:
        reason = f"the split is broken: {canary.keys} keys on the canary, {control.keys} on the control"
        return replace(line, verdict=Verdict.ERROR, reason=reason)
    return line


def _pairs(segments: Sequence[Segment]) -> Pairs:
    """Canary and control of all classes together and of each class that either has seen."""
    found = {(s.arm, s.traffic_class or ALL): s for s in segments}
    names = sorted({name for _, name in found}, key=lambda name: (name != ALL, name))
    return {name: tuple(found.get((arm, name), _nothing(arm, name)) for arm in (CANARY, CONTROL)) for name in names}  # type: ignore[misc]


def _arms(pairs: Pairs, name: str) -> tuple[Segment, Segment]:
    return pairs.get(name) or (_nothing(CANARY, name), _nothing(CONTROL, name))


def _nothing(arm: str, name: str) -> Segment:
    return Segment(arm, None if name == ALL else name, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0)


def _moments(segment: Segment) -> Moments:
    return Moments(segment.n, segment.x, segment.y, segment.xx, segment.yy, segment.xy)


def _scaled(m: Moments, by: float) -> Moments:
    """The moments of ``by``·x and y."""
    return Moments(m.n, m.x * by, m.y, m.xx * by * by, m.yy, m.xy * by)


def _where(segment: str) -> str:
    return "" if segment == ALL else f"in class {segment}: "
