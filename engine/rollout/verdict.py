"""The verdict on a rollout's present stage, from its guard table and what is known of its replicas."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from math import log

from engine.contracts import CANARY, CONTROL, Verdict
from engine.rollout.guards import RolloutSpec, TokensPerStep
from engine.rollout.records import Evidence, GuardResult, RolloutStatus

LEANS = log(10.0)
"""No promotion while some guard has evidence of 10 against the canary in some class: the blend may hide a small one."""


def blindness(spec: RolloutSpec, status: RolloutStatus, evidence: Evidence, now: datetime) -> str | None:
    """Why nobody sees what the canary does; None where it is seen, or is given nothing: no traffic is no blindness.

    Traces that do not come are as bad as counts that cannot be read: replicas say when they gave the canary a request,
    and each one leaves a trace, however it ends.
    """
    if evidence.fault is not None:
        return evidence.fault
    given = max((r.canary_at for r in evidence.replicas if r.canary_at is not None), default=None)
    heard = max(evidence.newest_canary or status.present.began, status.present.began)
    if given is None or given <= heard or now - heard <= timedelta(seconds=spec.stale_s):
        return None
    return f"the canary is given requests, and none of its traces has come since {heard:%H:%M:%S} UTC"


def judge(
    spec: RolloutSpec,
    status: RolloutStatus,
    evidence: Evidence,
    guards: Sequence[GuardResult],
    now: datetime,
    needs_proof: bool = True,
) -> tuple[Verdict, str]:
    """The verdict on the present stage and its reason. FAIL comes before everything that is merely in the way.

    The last stage needs proof that the canary is not worse, unless ``needs_proof`` is False (a person approves).
    """
    by_verdict = {v: [g for g in guards if g.verdict is v] for v in Verdict}
    if failed := by_verdict[Verdict.FAIL]:
        return Verdict.FAIL, "; ".join(f"{g.guard}: {g.reason}" for g in failed)
    if (blind := blindness(spec, status, evidence, now)) is not None:
        return Verdict.ERROR, blind
    stage = status.stage
    for replica in evidence.alive:
        if replica.load_error:
            return Verdict.ERROR, f"{replica.replica_id} could not load all of the plan: {replica.load_error}"
    if broken := by_verdict[Verdict.ERROR]:
        return Verdict.ERROR, "; ".join(f"{g.guard}: {g.reason}" for g in broken)
    if evidence.ledger is not None and evidence.ledger.generation != status.generation:
        return Verdict.ERROR, f"{evidence.ledger.actor} changed the ledger: {evidence.ledger.reason}"
    heard = max(evidence.newest_trace or stage.began, stage.began)
    if now - heard > timedelta(seconds=spec.stale_s):
        return Verdict.STALE, f"no request of either arm since {heard:%H:%M:%S} UTC"
    behind = [r.replica_id for r in evidence.alive if (r.observed_generation or 0) < stage.generation]
    if not evidence.alive or behind:
        return Verdict.INSUFFICIENT, f"waiting for {', '.join(behind) or 'a replica'} to route by {stage.generation}"
    if now - stage.began < timedelta(seconds=spec.warmup_s):
        return Verdict.INSUFFICIENT, f"warming up for {spec.warmup_s:g} s"
    got = {s.arm: s.stage_requests for s in evidence.segments if s.traffic_class is None}
    if (least := min(got.get(CANARY, 0), got.get(CONTROL, 0))) < spec.min_requests:
        return Verdict.INSUFFICIENT, f"{least} of {spec.min_requests} requests per arm at this weight"
    proof = next(g for g in guards if g.guard == TokensPerStep.kind)
    if needs_proof and len(status.stages) == len(spec.steps):
        if proof.verdict is not Verdict.PASS:
            return Verdict.INSUFFICIENT, f"{proof.guard}: {proof.reason}"
        for guard in guards:
            if guard.lean is not None and guard.lean > LEANS:
                where = f" in class {guard.worst}" if guard.worst else ""
                return Verdict.INSUFFICIENT, f"{guard.guard}: leans against the canary{where}, not certain yet"
    return Verdict.PASS, f"no guard fails; {proof.reason}"
