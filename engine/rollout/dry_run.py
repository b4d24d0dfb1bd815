"""Guards tried on the past before they guard anything: equal arms made of real traffic, and rollouts that are over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np

from engine.contracts import CANARY, CONTROL, Verdict
from engine.percent import percent
from engine.rollout.evaluate import evaluate
from engine.rollout.guards import RolloutSpec, TokensPerStep
from engine.rollout.records import evidence_from_json, status_from_json
from engine.store.repositories.evidence import Past
from engine.store.repositories.rollouts import DecisionRecord
from engine.store.segments import Keys, Request, Segment, Tally


@dataclass(frozen=True, slots=True)
class Equal:
    """Splits of one version's traffic into two arms that are the same: how often some guard would have fired.

    ``passed`` requests per arm after which tokens per step was called not worse, one entry per split that got there.
    """

    splits: int
    fired: tuple[str, ...]
    passed: tuple[int, ...]
    requests: int
    per_second: float


@dataclass(frozen=True, slots=True)
class Found:
    """How soon one guard finds what was planted in past traffic: requests per arm, one entry a split that got there."""

    guard: str
    planted: str
    splits: int
    requests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Incident:
    """What these guards would have said of a rollout that is over; ``at`` None where they would not have fired.

    ``unknown`` are latencies that its evidence does not have: no guard of it looked at them. ``looked`` decisions had
    evidence that could be read.
    """

    rollout_id: int
    ended: str
    at: datetime | None
    guard: str
    requests: int
    unreadable: int
    unknown: tuple[str, ...] = ()
    looked: int = 0


def equal_arms(spec: RolloutSpec, past: Past, splits: int) -> Equal:
    """``past`` is what one version served."""
    fired, passed = [], []
    for split in range(splits):
        first, second = _split(past.requests, f"dry-run-{split}")
        seen_pass = False
        for n, segments in _looks(first, second):
            results = evaluate(spec, segments)
            failed = next((g for g in results if g.verdict is Verdict.FAIL), None)
            if failed is not None:
                fired.append(failed.guard)
                break
            proof = next(g for g in results if g.guard == TokensPerStep.kind)
            if not seen_pass and proof.verdict is Verdict.PASS:
                seen_pass = True
                passed.append(n)
    requests = len(past.requests)
    per_second = requests / past.seconds if past.seconds > 0 else 0.0
    return Equal(splits, tuple(fired), tuple(passed), requests, per_second)


def planted(spec: RolloutSpec, past: Past, splits: int, seed: int = 0) -> list[Found]:
    """How many requests each statistical guard needs until it fails a canary that is worse by so much and no more.

    The canary's half of past traffic commits a tenth less per step, takes half as long again, and one request in
    twenty more fails, runs out of time or is sent again: each guard is asked for itself alone.
    """
    names = {guard.name: _PLANTED[guard.kind] for guard in spec.guards if guard.kind in _PLANTED}
    found: dict[str, list[int]] = {name: [] for name in names}
    for split in range(splits):
        rng = np.random.default_rng([seed, split])
        first, second = _split(past.requests, f"dry-run-{split}")
        waiting = set(names)
        for n, segments in _looks([_worse(request, rng) for request in first], second):
            failed = {g.guard for g in evaluate(spec, segments) if g.verdict is Verdict.FAIL} & waiting
            for name in failed:
                found[name].append(n)
            waiting -= failed
            if not waiting:
                break
    return [Found(name, said, splits, tuple(found[name])) for name, said in names.items()]


_PLANTED = {
    "tokens_per_step": "a tenth fewer tokens per step",
    "latency": "latencies half as long again",
    "errors": "5 % more errors",
    "timeouts": "5 % more timeouts",
    "retries": "5 % more retries",
}


def _worse(request: Request, rng: np.random.Generator) -> Request:
    fails, hangs, again = rng.random(3) < 0.05
    return replace(
        request,
        status="error" if fails else "timeout" if hangs else request.status,
        retry=request.retry + int(again),
        accepted=max(0, round(0.9 * (request.steps + request.accepted)) - request.steps),
        seconds=tuple(1.5 * s if s is not None else None for s in request.seconds),
    )


def incident(spec: RolloutSpec, rollout_id: int, ended: str, decisions: Sequence[DecisionRecord]) -> Incident:
    """The guards on the evidence that each decision about a rollout was made of."""
    unreadable, looked, wanted, known = 0, 0, set(spec.metrics()), set[str]()
    for decision in decisions:
        if "inputs" not in decision.evidence:
            continue
        try:
            evidence, _ = evidence_from_json(decision.evidence)
            restarts = status_from_json(decision.status_before).restarts
        except (KeyError, TypeError, ValueError):  # written by an earlier version of the code
            unreadable += 1
            continue
        looked += 1
        before = decision.status_before
        watching, in_shadow = bool(before.get("watch")), bool(before.get("shadow")) and not before.get("stages")
        known |= {metric for segment in evidence.segments for metric in segment.latencies}
        for guard in evaluate(spec, evidence.segments, restarts, decision.decided_at, watching, in_shadow):
            if guard.verdict is Verdict.FAIL:
                n = min(guard.n_canary, guard.n_control)
                return Incident(rollout_id, ended, decision.decided_at, guard.guard, n, unreadable, looked=looked)
    unknown = tuple(sorted(wanted - known)) if known else ()
    return Incident(rollout_id, ended, None, "", 0, unreadable, unknown, looked)


def report(
    spec: RolloutSpec, equal: Equal | None, found: Sequence[Found], incidents: Sequence[Incident]
) -> Iterator[str]:
    """What a dry run says, line by line."""
    if spec.slices is not None:
        yield "traces do not say which slice a request asked for: tried on the requests of all slices"
    if equal is None:
        yield "no past traffic of the champion to try the guards on"
    else:
        yield falsely(spec, equal)
        yield from until_passed(spec, equal)
        for one in found:
            yield _told(one, equal, spec)
    for past in incidents:
        did = past.ended.lower().replace("_", " ")
        yield f"rollout {past.rollout_id} ended as {did}: {retold(past)}"


def seconds(spec: RolloutSpec, per_second: float, per_arm: float) -> float:
    """How long it takes until ``per_arm`` requests of each arm count, through the steps: each begins with its warm-up
    and is left after ``min_requests``, the last one never. ``per_second`` is the eligible traffic."""
    took, left = 0.0, per_arm
    for place, weight in enumerate(spec.steps):
        here = left if place == len(spec.steps) - 1 else min(left, spec.min_requests)
        took += spec.warmup_s + here / (per_second * weight)
        left -= here
        if left <= 0:
            break
    return took


def _minutes(spec: RolloutSpec, per_second: float, per_arm: float) -> str:
    return f"{seconds(spec, per_second, per_arm) / 60:,.0f} min at {per_second:.2g} requests/s"


def until_passed(spec: RolloutSpec, equal: Equal) -> Iterator[str]:
    """How long an equal canary takes to be called not worse, and how long its steps take at least."""
    if not equal.per_second:
        yield "too little past traffic to reckon how long anything takes"
        return
    if equal.passed:
        need = max(float(np.median(equal.passed)), float(spec.min_requests * len(spec.steps)))
        yield (
            f"an equal canary is called not worse after {need:,.0f} requests per arm (median of "
            f"{len(equal.passed)} splits), {_minutes(spec, equal.per_second, need)}"
        )
    else:
        yield f"{equal.requests // 2:,} requests per arm are not enough to call an equal canary not worse"
    least = seconds(spec, equal.per_second, spec.min_requests * len(spec.steps))
    yield f"the steps and the soak alone take {(least + spec.soak_s) / 60:,.0f} min at that traffic"


def falsely(spec: RolloutSpec, equal: Equal) -> str:
    """How often equal arms would have been rolled back, with its bound: none of forty splits proves no hundredth, and
    the splits share their requests."""
    from scipy.stats import binomtest

    fired = len(equal.fired)
    high = float(binomtest(fired, equal.splits).proportion_ci(method="exact").high)
    by = f", by {', '.join(sorted(set(equal.fired)))}" if equal.fired else ""
    return (
        f"equal arms: {fired} of {equal.splits} splits of {equal.requests:,} past requests would have been rolled back "
        f"falsely ({percent(fired / equal.splits, 1)}, up to {percent(high, 1)} at 95 % were the splits independent; "
        f"they share their requests; the budget is {percent(spec.alpha)}){by}"
    )


def _told(found: Found, equal: Equal, spec: RolloutSpec) -> str:
    where = f"{found.guard}: {found.planted}"
    if 2 * len(found.requests) <= found.splits:
        return f"{where} would mostly not be found in {equal.requests // 2:,} requests per arm"
    need = float(np.median(found.requests))
    minutes = f", {_minutes(spec, equal.per_second, need)}" if equal.per_second > 0 else ""
    missed = found.splits - len(found.requests)
    late = f"; {missed} of {found.splits} splits needed more than there are" if missed else ""
    return f"{where} would be found after {need:,.0f} requests per arm{minutes}{late}"


def retold(found: Incident) -> str:
    """What these guards would have said of a rollout that is over."""
    if not found.looked:
        said = "it left no evidence to try these guards on"
    elif found.at is None:
        said = "these guards would not have rolled it back"
    else:
        said = f"{found.guard} would have rolled it back at {found.at:%Y-%m-%d %H:%M:%S} ({found.requests:,} per arm)"
    lost = f"; {found.unreadable} decisions could not be read" if found.unreadable else ""
    blind = f"; its evidence does not have {', '.join(found.unknown)}" if found.unknown else ""
    return f"{said}{blind}{lost}"


def _split(past: Sequence[Request], salt: str) -> tuple[list[Request], list[Request]]:
    """Two arms, by a hash of the key."""
    arms: tuple[list[Request], list[Request]] = ([], [])
    for request in past:
        side = hashlib.blake2b(f"{salt}\x00{request.key}".encode(), digest_size=1).digest()[0] & 1
        arms[side].append(replace(request, arm=(CANARY, CONTROL)[side]))
    return arms


def _looks(first: Sequence[Request], second: Sequence[Request]) -> Iterator[tuple[int, list[Segment]]]:
    """Both arms after 20 requests each, then after about a tenth more each time."""
    n, seen, most = 20, 0, min(len(first), len(second))
    tally, keys = Tally(), Keys()
    while n <= most:
        tally.take([*first[seen:n], *second[seen:n]], keys)
        yield n, tally.segments()
        seen, n = n, max(n + 5, int(n * 1.1))
