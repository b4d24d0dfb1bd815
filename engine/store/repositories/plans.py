"""The ledger of serving plans: the only way anything that is served changes.

Its statements are written out: a rollback typed in an emergency must not wait for SQLAlchemy to be imported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from engine.contracts import SHADOW, Arm, ServingPlan, SlipstreamError
from engine.store import locks
from engine.store.connection import Reads, Writes
from engine.store.repositories import eligibility

CHANNEL = "serving_plans"
"""NOTIFY channel; the payload is the new generation."""


class StalePlan(SlipstreamError):
    """Somebody changed the ledger since the caller looked."""


class Retired(SlipstreamError):
    """The plan would serve, or go back to, a version that was retired for good."""


@dataclass(frozen=True, slots=True)
class Observation:
    """When a replica began to route by a generation; ``error``: what of it could not be loaded."""

    replica_id: str
    generation: int
    observed_at: datetime
    load_s: float
    error: str | None


def lock(session: Writes) -> None:
    """Until this transaction ends nobody else changes the ledger, so what is read of it stays true."""
    session.change("SELECT pg_advisory_xact_lock(%(key)s)", key=locks.LEDGER)


def append(
    session: Writes,
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
        done = session.rows("SELECT * FROM serving_plans WHERE idempotency_key = %(key)s", key=idempotency_key)
        if done:
            return _plan(done[0])
    newest = session.rows("SELECT coalesce(max(generation), 0) AS generation FROM serving_plans")[0].generation
    if expected_generation is not None and expected_generation != newest:
        raise StalePlan(
            f"The serving plan is at generation {newest}, not {expected_generation}: somebody changed it meanwhile. "
            "Look at it again and repeat if you still want to."
        )
    _check(arms)
    named = {champion, *(arm.policy_version for arm in arms), *(() if rollback_to is None else (rollback_to,))}
    if unknown := eligibility.unknown(session, named | {fallback}):
        raise SlipstreamError(
            f"The plan names policy versions that do not exist: {_versions(unknown)}. "
            "`slipstream policy list` shows those that do."
        )
    if gone := eligibility.retired(session, named - {fallback}):
        raise Retired(
            f"Retired for good, and never to be served again: {_versions(gone)}. "
            "Choose another version; `slipstream policy list` shows them."
        )
    (made,) = session.change(
        "INSERT INTO serving_plans (generation, champion, fallback, rollback_to, arms, traffic_classes, tenants,"
        " slices, salt, actor, reason, rollout_id, idempotency_key) VALUES (%(generation)s, %(champion)s, %(fallback)s,"
        " %(rollback_to)s, %(arms)s::jsonb, %(traffic_classes)s::text[], %(tenants)s::text[], %(slices)s::text[],"
        " %(salt)s, %(actor)s, %(reason)s, %(rollout_id)s, %(idempotency_key)s) RETURNING *",
        generation=newest + 1,
        champion=champion,
        fallback=fallback,
        rollback_to=rollback_to,
        arms=json.dumps([asdict(arm) for arm in arms]),
        traffic_classes=_sorted(traffic_classes),
        tenants=_sorted(tenants),
        slices=_sorted(slices),
        salt=salt,
        actor=actor,
        reason=reason,
        rollout_id=rollout_id,
        idempotency_key=idempotency_key,
    )
    session.change("SELECT pg_notify(%(channel)s, %(payload)s)", channel=CHANNEL, payload=str(made.generation))
    return _plan(made)


def roll_back(
    session: Writes, *, actor: str, reason: str, to: int | None = None, idempotency_key: str | None = None
) -> ServingPlan:
    """Take the canary away and serve ``to``: by default the champion recorded when the canary started.

    One transaction, needing no controller, no learner and no MLflow. Safe to repeat: where there is neither a canary
    nor a promotion to take back, the plan in force is given back unchanged. An earlier champion is never guessed, it
    may be the very version that was taken back a moment ago; name it with ``to``. Where the recorded champion was
    retired meanwhile, its nearest ancestor that may be served takes its place; a retired ``to`` is refused.
    """
    if to is not None and eligibility.unknown(session, [to]):
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
        target = eligibility.standing(session, recorded, now.fallback, without=now.versions - {recorded})
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


def latest(session: Reads) -> ServingPlan | None:
    found = session.rows("SELECT * FROM serving_plans ORDER BY generation DESC LIMIT 1")
    return _plan(found[0]) if found else None


def get(session: Reads, generation: int) -> ServingPlan | None:
    found = session.rows("SELECT * FROM serving_plans WHERE generation = %(generation)s", generation=generation)
    return _plan(found[0]) if found else None


def previous_champion(session: Reads, plan: ServingPlan) -> int | None:
    """The champion before the present one; None when there has been but one."""
    found = session.rows(
        "SELECT champion FROM serving_plans WHERE generation < %(generation)s AND champion <> %(champion)s"
        " ORDER BY generation DESC LIMIT 1",
        generation=plan.generation,
        champion=plan.champion,
    )
    return found[0].champion if found else None


def history(
    session: Reads, since: datetime | None = None, until: datetime | None = None, limit: int = 500
) -> list[ServingPlan]:
    """Plans in a time window, newest first: the deploy markers of every chart."""
    found = session.rows(
        "SELECT * FROM serving_plans WHERE created_at >= coalesce(%(since)s::timestamptz, '-infinity')"
        " AND created_at <= coalesce(%(until)s::timestamptz, 'infinity') ORDER BY generation DESC LIMIT %(limit)s",
        since=since,
        until=until,
        limit=limit,
    )
    return [_plan(row) for row in found]


def champion_since(session: Reads, plan: ServingPlan) -> datetime:
    """When the champion of a plan became that, however much has been tried beside it since."""
    (found,) = session.rows(
        "SELECT min(created_at) AS since FROM serving_plans WHERE generation <= %(generation)s AND generation > ("
        " SELECT coalesce(max(generation), 0) FROM serving_plans"
        " WHERE generation <= %(generation)s AND champion <> %(champion)s)",
        generation=plan.generation,
        champion=plan.champion,
    )
    return found.since


def observe(
    session: Writes, replica_id: str, generation: int, observed_at: datetime, load_s: float, error: str | None = None
) -> None:
    """Say that a replica now routes by ``generation``, or that it could not load what the plan names."""
    session.change(
        "INSERT INTO plan_observations (replica_id, generation, observed_at, load_s, error) VALUES (%(replica_id)s,"
        " %(generation)s, %(observed_at)s, %(load_s)s, %(error)s) ON CONFLICT (replica_id, generation) DO UPDATE SET"
        " observed_at = excluded.observed_at, load_s = excluded.load_s, error = excluded.error",
        replica_id=replica_id,
        generation=generation,
        observed_at=observed_at,
        load_s=load_s,
        error=error,
    )


def observations(session: Reads, generation: int) -> list[Observation]:
    found = session.rows(
        "SELECT replica_id, generation, observed_at, load_s, error FROM plan_observations"
        " WHERE generation = %(generation)s ORDER BY replica_id",
        generation=generation,
    )
    return [Observation(*row) for row in found]


def _check(arms: Sequence[Arm]) -> None:
    for arm in arms:
        if arm.name == SHADOW and arm.weight:
            raise SlipstreamError(f"A shadow serves nobody: its weight is 0, not {arm.weight}.")
        if not 0.0 <= arm.weight <= 0.5:
            raise SlipstreamError(
                f"Arm {arm.name} has weight {arm.weight}: between 0 and 0.5, canary and control are equal."
            )


def _sorted(names: Sequence[str] | None) -> list[str] | None:
    return sorted(names) if names is not None else None


def _versions(numbers: Sequence[int]) -> str:
    return ", ".join(f"v{number}" for number in numbers)


def _plan(row: Any) -> ServingPlan:
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
