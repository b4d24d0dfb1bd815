"""Forgetting a tenant: its traces go, and what they influenced is named or taken out of service.

The record of which ordinals were theirs stays, without any text, so that the question can be asked again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from engine.contracts import ServingPlan
from engine.store.database import Database, WriteSession
from engine.store.repositories import eligibility, plans, policies, tenants


@dataclass(frozen=True, slots=True)
class Forgotten:
    """``influenced``: every version those traces taught, through inherited weights too. ``retired``: those among them
    that were in use until now. ``plan``: the plan that took them out of service, None when none was served."""

    tenant: str
    traces: int
    influenced: tuple[int, ...]
    retired: tuple[int, ...] = ()
    plan: ServingPlan | None = None


def forget(db: Database, tenant: str, retire: bool, actor: str, now: datetime) -> Forgotten:
    """Delete a tenant's traces and, with ``retire``, take every version they influenced out of service, in one step.

    Whether the tenant's next requests may teach is another question: ``tenants.allow_training``.
    """
    with db.write() as session:
        gone = tenants.forget(session, tenant, now)
        # A version is either registered by now, and found, or its registration comes later and finds its traces marked.
        policies.lock_lineage(session)
        influenced = policies.influenced_by_any(session, tenants.ordinals(session, tenant))
        if not retire:
            return Forgotten(tenant, gone, tuple(influenced))
        plans.lock(session)  # no plan that serves one of them slips in between
        retired = policies.retire(session, influenced, f"tenant {tenant} was forgotten", now)
        plan = _withdraw(session, influenced, actor, f"tenant {tenant} was forgotten")
    return Forgotten(tenant, gone, tuple(influenced), tuple(retired), plan)


def _withdraw(session: WriteSession, versions: Collection[int], actor: str, reason: str) -> ServingPlan | None:
    """A plan that names none of these versions, which are retired by now, where the present one does.

    Its champion is the present one's nearest ancestor that may be served, else the fallback. A promotion that stays can
    still be taken back.
    """
    now = plans.latest(session)
    if now is None or not now.versions & set(versions):
        return None
    champion = eligibility.standing(session, now.champion, now.fallback)
    rollback_to = None
    if champion == now.champion and not now.arms and now.rollback_to is not None:
        rollback_to = eligibility.standing(session, now.rollback_to, now.fallback, without=(champion,))
    return plans.append(
        session,
        champion=champion,
        fallback=now.fallback,
        rollback_to=rollback_to,
        rollout_id=now.rollout_id,
        actor=actor,
        reason=reason,
    )
