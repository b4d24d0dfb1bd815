"""Starting a rollout: a frozen specification, the champion of this moment, one row. The controller does the rest."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from engine.contracts import RolloutState, SlipstreamError
from engine.rollout import specs
from engine.rollout.guards import RolloutSpec
from engine.rollout.records import RolloutStatus, status_to_json
from engine.store.database import Database, WriteSession, server_clock
from engine.store.repositories import plans, policies, rollouts
from engine.store.repositories.rollouts import DecisionRecord, Rollout


def launch(
    db: Database,
    *,
    canary: int,
    actor: str,
    preset: str = "standard",
    spec: RolloutSpec | None = None,
    name: str = "",
    traffic_classes: Sequence[str] | None = None,
    draft: bool = False,
    now: datetime | None = None,
) -> Rollout:
    """Begin to try version ``canary`` against what is champion now, under ``spec`` or a preset.

    With ``draft`` it is only written down; ``release`` starts it, against what is champion then.
    SlipstreamError where the version does not exist, was retired or is champion already, or another rollout is active.
    """
    chosen = specs.validate(spec) if spec is not None else specs.preset(preset, traffic_classes)
    with db.write() as session:
        started = now or server_clock(session)
        champion = _champion(session, canary)
        state = RolloutState.DRAFT if draft else RolloutState.READY
        made = rollouts.create(
            session,
            name=name or f"v{canary}",
            spec=specs.to_dict(chosen),
            spec_hash=specs.spec_hash(chosen),
            canary=canary,
            champion=champion,
            actor=actor,
            state=state,
            status={},
            created_at=started,
        )
        reason = "a draft: `slipstream rollout start --draft` begins it" if draft else "waiting to start"
        status = RolloutStatus(made.id, canary, champion, state, started, reason=reason, asked_at=started)
        rollouts.apply(
            session,
            made.id,
            expected=state,
            state=state,
            status=status_to_json(status),
            decision=None if draft else _begun(status, f"started by {actor}"),
            now=started,
        )
        found = rollouts.get(session, made.id)
    assert found is not None
    return found


def release(db: Database, rollout_id: int, actor: str, now: datetime | None = None) -> Rollout:
    """Begin a draft. What is champion at this moment is what it is compared with and what a rollback returns to."""
    with db.write() as session:
        started = now or server_clock(session)
        drafted = rollouts.get(session, rollout_id)
        if drafted is None:
            raise SlipstreamError(f"There is no rollout {rollout_id}. `slipstream rollout list` shows them.")
        champion = _champion(session, drafted.canary)
        status = RolloutStatus(
            rollout_id,
            drafted.canary,
            champion,
            RolloutState.READY,
            started,
            reason="waiting to start",
            asked_at=started,
        )
        return rollouts.release(
            session,
            rollout_id,
            champion=champion,
            state=RolloutState.READY,
            status=status_to_json(status),
            reason=f"started by {actor}",
            now=started,
        )


def _begun(status: RolloutStatus, reason: str) -> DecisionRecord:
    return rollouts.moved_by_hand(
        status.rollout_id,
        RolloutState.DRAFT,
        RolloutState.READY,
        reason,
        status.since,
        canary=status.canary,
        champion=status.champion,
    )


def _champion(session: WriteSession, canary: int) -> int:
    """The champion of this moment; SlipstreamError where ``canary`` cannot be tried against it."""
    plan = plans.latest(session)
    if plan is None:
        raise SlipstreamError("There is no serving plan yet: start an engine first (`slipstream up`).")
    known = policies.get(session, canary)
    if known is None:
        raise SlipstreamError(f"There is no policy version {canary}. `slipstream policy list` shows them.")
    if known.retired_at is not None:
        raise SlipstreamError(f"v{canary} was retired for good; it is not rolled out again.")
    if plan.champion == canary:
        raise SlipstreamError(f"v{canary} is champion already; there is nothing to roll out.")
    return plan.champion
