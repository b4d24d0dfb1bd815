"""Guards that judge by no share of ``alpha``: fuses, which stand for the absolute, and the ratio of the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from math import log

import numpy as np

from engine.contracts import Verdict
from engine.rollout import quantiles, statistics
from engine.rollout.arms import ALL, Arms
from engine.rollout.guards import CostFuse, LatencyFuse, MismatchFuse, RestartFuse, SampleRatio
from engine.rollout.records import GuardResult

FUSE_DEVIATIONS = 2.5
"""By how many deviations of its rank the canary's quantile is taken lower, and the control's higher, before a fuse
believes their ratio. Fuses stand outside ``alpha``: a quantile between two modes must not blow one by chance."""


def ratio(guard: LatencyFuse | CostFuse, arms: Arms, deviations: float) -> GuardResult:
    """The canary's quantile against so many times the control's; ``deviations`` 0 takes both at their word."""
    n = [round(float(np.sum(arm[0].latencies.get(guard.metric, ((), ()))[1]))) for arm in (arms.canary, arms.control)]
    q, what = (0.95, f"p95 of {guard.metric}") if isinstance(guard, LatencyFuse) else (0.5, "median cost of a token")
    slow, usual = (arm[0].quantile(guard.metric, q) for arm in (arms.canary, arms.control))
    line = GuardResult(guard.name, Verdict.INSUFFICIENT, "", ALL, n[0], n[1], slow, usual, limit=guard.ratio)
    if min(n) < guard.min_requests or slow is None or not usual:
        return replace(line, reason=f"needs {guard.min_requests} keys per arm")
    if slow <= guard.ratio * usual:
        return replace(line, verdict=Verdict.PASS, reason=f"{what} within {guard.ratio:g} × the control")
    bounds = (
        quantiles.order_statistic(arm[0].latencies[guard.metric], q, side * deviations)
        for arm, side in ((arms.canary, -1.0), (arms.control, 1.0))
    )
    least, most = bounds if deviations else (slow, usual)
    if least <= guard.ratio * most:
        return replace(line, reason=f"{what} is more than {guard.ratio:g} × the control's, which may still be chance")
    reason = f"{what} is {slow:.3g} s on the canary, more than {guard.ratio:g} × the {usual:.3g} s of the control"
    return replace(line, verdict=Verdict.FAIL, reason=reason)


def mismatch(guard: MismatchFuse, arms: Arms) -> GuardResult:
    """One audited output of the canary that is not the target's own."""
    canary, control = arms.canary[0], arms.control[0]
    line = GuardResult(
        guard.name,
        Verdict.PASS,
        f"{canary.audited} outputs of the canary are the target's own",
        ALL,
        canary.audited,
        control.audited,
        canary.mismatches,
        control.mismatches,
        limit=1.0,
    )
    if canary.mismatches:
        reason = f"{canary.mismatches} of {canary.audited} outputs of the canary are not the target's own"
        return replace(line, verdict=Verdict.FAIL, reason=reason)
    if not canary.audited:
        return replace(line, verdict=Verdict.INSUFFICIENT, reason="no output of the canary has been audited")
    return line


def restarts(guard: RestartFuse, arms: Arms, started: Sequence[datetime], now: datetime | None) -> GuardResult:
    """Replicas that started again within the window before ``now``; ``started``: when."""
    recent = [at for at in started if now is None or now - at <= timedelta(seconds=guard.window_s)]
    reason = f"{len(recent)} restarts of replicas in {guard.window_s:g} s"
    n = (arms.canary[0].requests, arms.control[0].requests)
    verdict = Verdict.FAIL if len(recent) >= guard.restarts else Verdict.PASS
    return GuardResult(guard.name, verdict, reason, ALL, *n, canary=float(len(recent)), limit=float(guard.restarts))


def sample_ratio(guard: SampleRatio, arms: Arms) -> GuardResult:
    """Keys of both arms: a split that is not 1:1 is an error of the comparison, not of the canary."""
    canary, control = arms.canary[0].keys, arms.control[0].keys
    log_e, limit = float(statistics.log_e_mismatch(canary, control)), -log(guard.alpha)
    line = GuardResult(
        guard.name, Verdict.PASS, "both arms get equal traffic", ALL, canary, control, log_e=log_e, limit=limit
    )
    if log_e >= limit:
        reason = f"the split is broken: {canary} keys on the canary, {control} on the control"
        return replace(line, verdict=Verdict.ERROR, reason=reason)
    return line
