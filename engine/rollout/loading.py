"""What a tick starts from: a rollout that can be trusted, and everything that is known about it at this moment."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from engine.contracts import CANARY, SHADOW, ServingPlan, SlipstreamError
from engine.rollout import specs
from engine.rollout.decide import PROMOTED_STATES
from engine.rollout.guards import RolloutSpec, SpecError
from engine.rollout.records import Evidence, Ledger, Replica, RolloutStatus, status_from_json
from engine.store.database import ReadSession, WriteSession
from engine.store.repositories import commands, compared, plans, policies, replicas, shadow
from engine.store.repositories import evidence as evidence_store
from engine.store.repositories.commands import Command
from engine.store.repositories.compared import Window
from engine.store.repositories.evidence import Promoted
from engine.store.repositories.rollouts import Rollout

COUNT_S, MEASURE_S = 5.0, 3.0
"""Longest that counting new requests and reading what was counted may take: together inside a controller's lease."""
log = logging.getLogger(__name__)


class Untrusted(SlipstreamError):
    """A rollout whose guards are not those it was started with, or cannot be read."""


def frozen(rollout: Rollout) -> RolloutSpec:
    """The specification a rollout was started with, verified against its hash; Untrusted where it is another."""
    if specs.tree_hash(rollout.spec) != rollout.spec_hash:
        raise Untrusted(
            f"The guards of rollout {rollout.id} are not those it was started with (hash {rollout.spec_hash[:12]}…). "
            "Its canary goes back to the champion; start a new one."
        )
    try:
        return specs.thaw(rollout.spec)
    except (SpecError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(rollout, error) from error


def load(rollout: Rollout) -> tuple[RolloutSpec, RolloutStatus]:
    """The frozen specification, verified against its hash, and the status."""
    spec = frozen(rollout)
    try:
        return spec, status_from_json(rollout.status)
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(rollout, error) from error


def _unreadable(rollout: Rollout, error: Exception) -> Untrusted:
    return Untrusted(f"Rollout {rollout.id} cannot be read by this version of the code: {error!r}")


def count(session: WriteSession, spec: RolloutSpec, status: RolloutStatus, now: datetime) -> str | None:
    """Count the compared requests that came since the last tick; why the counts do not reach up to now, if so."""
    if not (windows := _windows(spec, status)):
        return None
    with evidence_store.within(session, COUNT_S):
        reached = compared.take_in(session, windows, now)
        if reached is not None:
            why = "more comes than is counted at a time, or a transaction writes since then"
            return f"requests are counted up to {reached:%H:%M:%S} UTC only: {why}"
        compared.forget(session, windows[0].generation)
    return None


def gather(
    session: ReadSession | WriteSession,
    spec: RolloutSpec,
    status: RolloutStatus,
    now: datetime,
    uncounted: str | None = None,
) -> tuple[Evidence, tuple[Command, ...]]:
    """Everything a tick looks at. Traffic that cannot be measured is a fault in the evidence, not the tick's end.

    ``uncounted`` is such a fault too, but what was counted until then is judged: a canary that fails on it fails.
    """
    plan = plans.latest(session)
    canary = policies.get(session, status.canary)
    errors = {o.replica_id: o.error for o in plans.observations(session, plan.generation)} if plan else {}
    asked = tuple(commands.asked(session, status.rollout_id, status.last_command))
    evidence = Evidence(
        ledger=_ledger(plan) if plan else None,
        replicas=tuple(
            Replica(
                r.replica_id,
                r.observed_generation,
                tuple(sorted(r.resident)),
                errors.get(r.replica_id),
                alive=now - r.heartbeat_at <= replicas.ALIVE,
                started_at=r.started_at,
                after_crash=bool(r.stats.get("after_crash")),
                canary_at=_given(r.stats.get("canary_given"), status),
            )
            for r in replicas.may_serve(session, now)
        ),
        canary_known=canary is not None and canary.retired_at is None,
        fault=uncounted,
    )
    try:  # last: whatever becomes of this transaction, everything else has been read
        if status.in_shadow and status.shadow is not None:
            return replace(evidence, **_shadowed(session, status.shadow.generation)), asked
        return replace(evidence, **_measured(session, spec, status)), asked
    except Exception as error:
        return unmeasured(status, evidence, error), asked


def unmeasured(status: RolloutStatus, evidence: Evidence, error: Exception) -> Evidence:
    """The evidence without its traffic. A fault of any kind must reach ``decide``, which ends what is unguarded."""
    said = str(error).strip().splitlines() or [""]
    fault = f"the traffic could not be measured: {type(error).__name__}: {said[0]}"
    log.error("rollout %d: %s", status.rollout_id, fault, exc_info=not isinstance(error, SQLAlchemyError))
    return replace(evidence, segments=(), newest_trace=None, newest_canary=None, observed=None, fault=fault)


def _given(said: Mapping[str, Any] | None, status: RolloutStatus) -> datetime | None:
    """When a replica gave the canary of the present stage a request; one of an earlier plan has its trace there."""
    if said is None or not status.serves or said["generation"] < status.present.generation:
        return None
    return datetime.fromisoformat(said["at"])


def _windows(spec: RolloutSpec, status: RolloutStatus) -> tuple[Window, ...]:
    """The stages that count: those of the trial, or the one after the promotion."""
    warmup = timedelta(seconds=spec.warmup_s)
    stages = status.stages if status.watch is None else (status.watch,)
    return tuple(Window(stage.generation, stage.began, stage.began + warmup) for stage in stages)


def _promoted(status: RolloutStatus) -> Promoted | None:
    if status.state not in PROMOTED_STATES or status.generation is None:
        return None
    return Promoted(status.canary, status.generation, tuple(stage.generation for stage in status.stages))


def _measured(session: ReadSession | WriteSession, spec: RolloutSpec, status: RolloutStatus) -> dict[str, Any]:
    """What the traffic of all stages shows; it must be there before another controller takes the lease for dead."""
    if not (windows := _windows(spec, status)):
        return {}
    with evidence_store.within(session, MEASURE_S):
        newest = evidence_store.newest(session, windows[-1])
        return {
            "segments": tuple(evidence_store.segments(session, windows, spec.metrics(), _promoted(status))),
            "newest_trace": max((at for at in newest.values() if at is not None), default=None),
            "newest_canary": newest[CANARY],
            "observed": None if status.watch is not None else _observed(session, spec, windows[-1]),
        }


def _shadowed(session: ReadSession | WriteSession, generation: int) -> dict[str, Any]:
    """What canary and champion would have earned on the same requests."""
    with evidence_store.within(session, MEASURE_S):
        return {
            "segments": tuple(shadow.segments(session, generation)),
            "newest_trace": shadow.newest(session, generation),
        }


def _observed(session: ReadSession | WriteSession, spec: RolloutSpec, window: Window) -> float | None:
    """The canary's share of the eligible requests; unknown where rollups cannot tell which those are."""
    if spec.tenants is not None or spec.slices is not None:
        return None
    return evidence_store.observed_share(session, window, spec.traffic_classes)


def _ledger(plan: ServingPlan) -> Ledger:
    canary = plan.canary or plan.arm(SHADOW)
    return Ledger(
        generation=plan.generation,
        champion=plan.champion,
        fallback=plan.fallback,
        canary=canary.policy_version if canary else None,
        rollout_id=plan.rollout_id,
        actor=plan.actor,
        reason=plan.reason,
    )
