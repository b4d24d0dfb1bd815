"""The ledger of serving plans: the only way anything that is served changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime

from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError

from engine.contracts import Arm, ServingPlan, SlipstreamError
from engine.store.database import ReadSession, WriteSession
from engine.store.models import PlanObservationRow, PolicyVersionRow, ServingPlanRow
from engine.store.repositories import policies

CHANNEL = "serving_plans"
"""NOTIFY channel; the payload is the new generation."""

_LEDGER_LOCK = 0x51195_0001  # advisory lock: generations are handed out one at a time


class StalePlan(SlipstreamError):
    """Somebody changed the ledger since the caller looked."""


class Retired(SlipstreamError):
    """The plan would serve, or go back to, a version that was retired for good."""


def lock(session: WriteSession) -> None:
    """Until this transaction ends nobody else changes the ledger, so what is read of it stays true."""
    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LEDGER_LOCK})


def append(
    session: WriteSession,
    *,
    champion: int,
    fallback: int,
    actor: str,
    reason: str,
    arms: Sequence[Arm] = (),
    salt: str = "",
    traffic_classes: Sequence[str] | None = None,
    tenants: Sequence[str] | None = None,
    slices: Sequence[str] | None = None,
    rollback_to: int | None = None,
    rollout_id: int | None = None,
    expected_generation: int | None = None,
    idempotency_key: str | None = None,
) -> ServingPlan:
    """Add the next generation and notify every replica when the transaction commits.

    ``expected_generation`` is the generation the caller decided on; StalePlan if the ledger has moved since. With an
    ``idempotency_key`` that was used before, the plan it made is returned and nothing is added.

    Retired where the plan names a version that was retired. The fallback is exempt: something must always serve.
    """
    lock(session)
    if idempotency_key is not None:
        done = session.scalar(select(ServingPlanRow).where(ServingPlanRow.idempotency_key == idempotency_key))
        if done is not None:
            return _plan(done)
    newest = session.scalar(select(func.max(ServingPlanRow.generation))) or 0
    if expected_generation is not None and expected_generation != newest:
        raise StalePlan(
            f"The serving plan is at generation {newest}, not {expected_generation}: somebody changed it meanwhile. "
            "Look at it again and repeat if you still want to."
        )
    _check(arms)
    named = {champion, *(arm.policy_version for arm in arms), *(() if rollback_to is None else (rollback_to,))}
    if gone := policies.retired(session, named - {fallback}):
        raise Retired(
            f"Retired for good, and never to be served again: {', '.join(f'v{v}' for v in gone)}. "
            "Choose another version; `slipstream policy list` shows them."
        )
    row = ServingPlanRow(
        generation=newest + 1,
        champion=champion,
        fallback=fallback,
        rollback_to=rollback_to,
        arms=[asdict(arm) for arm in arms],
        traffic_classes=sorted(traffic_classes) if traffic_classes is not None else None,
        tenants=sorted(tenants) if tenants is not None else None,
        slices=sorted(slices) if slices is not None else None,
        salt=salt,
        actor=actor,
        reason=reason,
        rollout_id=rollout_id,
        idempotency_key=idempotency_key,
    )
    session.add(row)
    try:
        session.flush()
    except IntegrityError as error:
        raise SlipstreamError(f"The plan names a policy version that does not exist: {error.orig}") from error
    session.refresh(row)
    session.execute(text("SELECT pg_notify(:channel, :payload)"), {"channel": CHANNEL, "payload": str(row.generation)})
    return _plan(row)


def roll_back(
    session: WriteSession, *, actor: str, reason: str, to: int | None = None, idempotency_key: str | None = None
) -> ServingPlan:
    """Take the canary away and serve ``to``: by default the champion recorded when the canary started.

    One transaction, needing no controller, no learner and no MLflow. Safe to repeat: where there is neither a canary
    nor a promotion to take back, the plan in force is given back unchanged. An earlier champion is never guessed, it
    may be the very version that was taken back a moment ago; name it with ``to``. Where the recorded champion was
    retired meanwhile, its nearest ancestor that may be served takes its place; a retired ``to`` is refused.
    """
    if to is not None and session.get(PolicyVersionRow, to) is None:
        raise SlipstreamError(f"There is no policy version {to}. `slipstream policy list` shows them.")
    lock(session)
    now = latest(session)
    if now is None:
        raise SlipstreamError("There is no serving plan yet: start an engine first (`slipstream up`).")
    target = to
    if target is None:
        recorded = now.rollback_target
        if recorded is None:
            return now
        target = policies.standing(session, recorded, now.fallback, without=now.versions - {recorded})
    return append(
        session,
        champion=target,
        fallback=now.fallback,
        actor=actor,
        reason=reason,
        salt=now.salt,
        rollout_id=now.rollout_id,
        idempotency_key=idempotency_key,
    )


def latest(session: ReadSession | WriteSession) -> ServingPlan | None:
    row = session.scalar(select(ServingPlanRow).order_by(ServingPlanRow.generation.desc()).limit(1))
    return _plan(row) if row else None


def get(session: ReadSession | WriteSession, generation: int) -> ServingPlan | None:
    row = session.get(ServingPlanRow, generation)
    return _plan(row) if row else None


def previous_champion(session: ReadSession | WriteSession, plan: ServingPlan) -> int | None:
    """The champion before the present one; None when there has been but one."""
    return session.scalar(
        select(ServingPlanRow.champion)
        .where(ServingPlanRow.generation < plan.generation, ServingPlanRow.champion != plan.champion)
        .order_by(ServingPlanRow.generation.desc())
        .limit(1)
    )


def history(
    session: ReadSession | WriteSession,
    since: datetime | None = None,
    until: datetime | None = None,
    limit: int = 500,
) -> list[ServingPlan]:
    """Plans in a time window, newest first: the deploy markers of every chart."""
    query = select(ServingPlanRow).order_by(ServingPlanRow.generation.desc()).limit(limit)
    if since is not None:
        query = query.where(ServingPlanRow.created_at >= since)
    if until is not None:
        query = query.where(ServingPlanRow.created_at <= until)
    return [_plan(row) for row in session.scalars(query)]


def observe(
    session: WriteSession,
    replica_id: str,
    generation: int,
    observed_at: datetime,
    load_s: float,
    error: str | None = None,
) -> None:
    """Say that a replica now routes by ``generation``, or that it could not load what the plan names."""
    session.merge(
        PlanObservationRow(
            replica_id=replica_id, generation=generation, observed_at=observed_at, load_s=load_s, error=error
        )
    )


def observations(session: ReadSession | WriteSession, generation: int) -> list[PlanObservationRow]:
    return list(session.scalars(select(PlanObservationRow).where(PlanObservationRow.generation == generation)))


def _check(arms: Sequence[Arm]) -> None:
    for arm in arms:
        if not 0.0 <= arm.weight <= 0.5:
            raise SlipstreamError(
                f"Arm {arm.name} has weight {arm.weight}: between 0 and 0.5, canary and control are equal."
            )


def _plan(row: ServingPlanRow) -> ServingPlan:
    return ServingPlan(
        generation=row.generation,
        champion=row.champion,
        fallback=row.fallback,
        arms=tuple(Arm(**arm) for arm in row.arms),
        salt=row.salt,
        actor=row.actor,
        reason=row.reason,
        created_at=row.created_at,
        traffic_classes=frozenset(row.traffic_classes) if row.traffic_classes is not None else None,
        tenants=frozenset(row.tenants) if row.tenants is not None else None,
        slices=frozenset(row.slices) if row.slices is not None else None,
        rollback_to=row.rollback_to,
        rollout_id=row.rollout_id,
    )
