"""Which arm serves a request: a pure function of the serving plan and the assignment key.

Shared by the server, which routes with it, and by rollout and dry runs, which replay it. A key never changes arm while
the weights of a rollout only grow: an arm owns an interval of [0, 1) that starts at a fixed point.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from engine.contracts import CANARY, CHAMPION, CONTROL, Assignment, ServingPlan

ARM_OFFSETS = {CANARY: 0.0, CONTROL: 0.5}
"""Where each arm's interval begins (methods.md section 1): canary [0, w), control [0.5, 0.5 + w), w ≤ 0.5."""


def bucket(salt: str, key: str) -> float:
    """Hash an assignment key to [0, 1), uniformly and for ever the same."""
    digest = hashlib.blake2b(f"{salt}\x00{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits: exact in a float, so 1.0 cannot come out


def without(plan: ServingPlan, unloadable: frozenset[int], plain: int) -> ServingPlan:
    """The plan as a replica can serve it that could not load some of its versions.

    A canary serves only beside everything that its comparison and its rollback need, so any gap takes the arms away.
    For the champion the fallback stands in; for the fallback the version ``plain``, which needs nothing loaded.
    """
    if not unloadable & plan.versions:
        return plan
    standing_in = next(v for v in (plan.champion, plan.fallback, plain) if v not in unloadable)
    return replace(plan, champion=standing_in, arms=())


def assign(
    plan: ServingPlan,
    key: str,
    traffic_class: str,
    lease_expired: bool = False,
    tenant: str | None = None,
    slice_name: str | None = None,
) -> Assignment:
    """Give a request its arm.

    With ``lease_expired`` (the replica has heard nothing of the ledger for its lease) every key goes to the champion:
    a canary that nobody can take back must not serve.
    """
    if plan.takes(traffic_class, tenant, slice_name) and not lease_expired:
        point = bucket(plan.salt, key)
        for arm in plan.arms:
            start = ARM_OFFSETS.get(arm.name)  # a shadow has none: nobody is routed to it
            if start is not None and start <= point < start + arm.weight:
                return Assignment(arm.name, arm.policy_version, plan.generation)
    return Assignment(CHAMPION, plan.champion, plan.generation)
