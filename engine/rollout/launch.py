"""Starting a rollout: a frozen specification, the champion of this moment, one row. The controller does the rest."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from engine.contracts import RolloutState, SlipstreamError
from engine.rollout import specs
from engine.rollout.guards import RolloutSpec
from engine.rollout.records import RolloutStatus, status_to_json
from engine.store.database import Database
from engine.store.repositories import plans, policies, rollouts
from engine.store.repositories.rollouts import Rollout


def launch(
    db: Database,
    *,
    canary: int,
    actor: str,
    preset: str = "standard",
    spec: RolloutSpec | None = None,
    name: str = "",
    traffic_classes: Sequence[str] | None = None,
    now: datetime | None = None,
) -> Rollout:
    """Begin to try version ``canary`` against what is champion now, under ``spec`` or a preset.

    SlipstreamError where the version does not exist, is champion already, or another rollout is active.
    """
    chosen = specs.validate(spec) if spec is not None else specs.preset(preset, traffic_classes)
    started = now or datetime.now(UTC)
    with db.write() as session:
        plan = plans.latest(session)
        if plan is None:
            raise SlipstreamError("There is no serving plan yet: start an engine first (`slipstream up`).")
        if policies.get(session, canary) is None:
            raise SlipstreamError(f"There is no policy version {canary}. `slipstream policy list` shows them.")
        if plan.champion == canary:
            raise SlipstreamError(f"v{canary} is champion already; there is nothing to roll out.")
        made = rollouts.create(
            session,
            name=name or f"v{canary}",
            spec=specs.to_dict(chosen),
            spec_hash=specs.spec_hash(chosen),
            canary=canary,
            champion=plan.champion,
            actor=actor,
            state=RolloutState.READY,
            status={},
            created_at=started,
        )
        status = RolloutStatus(made.id, canary, plan.champion, RolloutState.READY, started, reason="waiting to start")
        rollouts.apply(
            session,
            made.id,
            expected=RolloutState.READY,
            state=RolloutState.READY,
            status=status_to_json(status),
            decision=None,
            now=started,
        )
        found = rollouts.get(session, made.id)
    assert found is not None
    return found
