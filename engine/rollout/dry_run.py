"""Guards tried on the past before they guard anything: equal arms made of real traffic, and rollouts that are over."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from engine.contracts import CANARY, CONTROL, Verdict
from engine.rollout.evaluate import evaluate
from engine.rollout.guards import METRICS, RolloutSpec, TokensPerStep
from engine.rollout.records import evidence_from_json
from engine.store import histogram
from engine.store.repositories.evidence import PastRequest, Segment
from engine.store.repositories.rollouts import DecisionRecord


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
class Incident:
    """What these guards would have said of a rollout that is over; ``at`` None where they would not have fired."""

    rollout_id: int
    ended: str
    at: datetime | None
    guard: str
    requests: int
    unreadable: int


def equal_arms(spec: RolloutSpec, past: Sequence[PastRequest], splits: int) -> Equal:
    """``past`` are requests that one version served, oldest first."""
    fired, passed = [], []
    for split in range(splits):
        first, second = _split(past, f"dry-run-{split}")
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
    seconds = (past[-1].started_at - past[0].started_at).total_seconds() if len(past) > 1 else 0.0
    return Equal(splits, tuple(fired), tuple(passed), len(past), len(past) / seconds if seconds > 0 else 0.0)


def incident(spec: RolloutSpec, rollout_id: int, ended: str, decisions: Sequence[DecisionRecord]) -> Incident:
    """The guards on the evidence that each decision about a rollout was made of."""
    unreadable = 0
    for decision in decisions:
        if "inputs" not in decision.evidence:
            continue
        try:
            evidence, _ = evidence_from_json(decision.evidence)
        except (KeyError, TypeError, ValueError):  # written by an earlier version of the code
            unreadable += 1
            continue
        watching = bool(decision.status_before.get("watch"))
        for guard in evaluate(spec, evidence.segments, watching=watching):
            if guard.verdict is Verdict.FAIL:
                n = min(guard.n_canary, guard.n_control)
                return Incident(rollout_id, ended, decision.decided_at, guard.guard, n, unreadable)
    return Incident(rollout_id, ended, None, "", 0, unreadable)


def report(spec: RolloutSpec, equal: Equal | None, incidents: Sequence[Incident]) -> Iterator[str]:
    """What a dry run says, line by line."""
    if equal is None:
        yield "no past traffic of the champion to try the guards on"
    else:
        share = len(equal.fired) / equal.splits
        yield (
            f"equal arms: {len(equal.fired)} of {equal.splits} splits of {equal.requests:,} past requests would have "
            f"been rolled back falsely ({share:.1%}; the budget is {spec.alpha:.0%})"
            + (f", by {', '.join(sorted(set(equal.fired)))}" if equal.fired else "")
        )
        if not equal.per_second:
            yield "too little past traffic to reckon how long anything takes"
        elif equal.passed:
            rate = equal.per_second * spec.steps[-1]
            need = float(np.median(equal.passed))
            yield (
                f"an equal canary is called not worse after {need:,.0f} requests per arm (median of "
                f"{len(equal.passed)} splits), {need / rate / 60:,.0f} min at {equal.per_second:.2g} requests/s"
            )
        else:
            yield f"{equal.requests // 2:,} requests per arm are not enough to call an equal canary not worse"
        if equal.per_second:
            least = sum(spec.min_requests / (equal.per_second * step) + spec.warmup_s for step in spec.steps)
            yield f"the steps and the soak alone take {(least + spec.soak_s) / 60:,.0f} min at that traffic"
    for found in incidents:
        did = found.ended.lower().replace("_", " ")
        if found.at is None:
            said = "these guards would not have rolled it back"
        else:
            said = (
                f"{found.guard} would have rolled it back at {found.at:%Y-%m-%d %H:%M:%S} ({found.requests:,} per arm)"
            )
        lost = f"; {found.unreadable} decisions could not be read" if found.unreadable else ""
        yield f"rollout {found.rollout_id} ended as {did}: {said}{lost}"


def _split(past: Sequence[PastRequest], salt: str) -> tuple[list[PastRequest], list[PastRequest]]:
    arms: tuple[list[PastRequest], list[PastRequest]] = ([], [])
    for request in past:
        digest = hashlib.blake2b(f"{salt}\x00{request.assignment_key}".encode(), digest_size=1).digest()
        arms[digest[0] & 1].append(request)
    return arms


def _looks(first: Sequence[PastRequest], second: Sequence[PastRequest]) -> Iterator[tuple[int, list[Segment]]]:
    """Both arms after 20 requests each, then after about a tenth more each time."""
    n, most = 20, min(len(first), len(second))
    while n <= most:
        yield n, [*_segments(CANARY, first[:n]), *_segments(CONTROL, second[:n])]
        n = max(n + 5, int(n * 1.1))


def _segments(arm: str, requests: Sequence[PastRequest]) -> list[Segment]:
    classes = sorted({request.traffic_class for request in requests})
    return [_segment(arm, None, requests)] + [
        _segment(arm, name, [r for r in requests if r.traffic_class == name]) for name in classes
    ]


def _segment(arm: str, name: str | None, requests: Sequence[PastRequest]) -> Segment:
    sums: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))  # key → what its requests committed, their steps
    for r in requests:
        if r.steps > 0:
            committed, steps = sums[r.assignment_key]
            sums[r.assignment_key] = committed + r.steps + r.accepted, steps + r.steps
    x, y = np.array(list(sums.values()), float).reshape(-1, 2).T
    fine = [r for r in requests if r.status == "ok"]
    return Segment(
        arm,
        name,
        requests=len(requests),
        stage_requests=len(requests),
        keys=len({r.assignment_key for r in requests}),
        error_keys=len({r.assignment_key for r in requests if r.status == "error" or r.draft_errors}),
        draft_error_keys=len({r.assignment_key for r in requests if r.draft_errors}),
        timeout_keys=len({r.assignment_key for r in requests if r.status == "timeout"}),
        retry_keys=len({r.assignment_key for r in requests if r.retry > 0}),
        n=len(sums),
        x=float(x.sum()),
        y=float(y.sum()),
        xx=float((x * x).sum()),
        yy=float((y * y).sum()),
        xy=float((x * y).sum()),
        latencies={metric: _weighed(fine, f"{metric}_s") for metric in METRICS},
    )


def _weighed(requests: Sequence[PastRequest], name: str) -> tuple[list[int], list[float]]:
    """The histogram of a latency in which each assignment key weighs one, as the evidence query makes it."""
    known = [(r.assignment_key, value) for r in requests if (value := getattr(r, name)) is not None]
    times, weights = Counter(key for key, _ in known), defaultdict[int, float](float)
    for key, value in known:
        weights[histogram.bucket(value)] += 1.0 / times[key]
    indices = sorted(weights)
    return indices, [weights[at] for at in indices]
