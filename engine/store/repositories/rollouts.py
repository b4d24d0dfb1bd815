"""Rollouts, and what was decided about them with which evidence."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, func, select, text, update

from engine.contracts import TERMINAL_STATES, RolloutState, SlipstreamError, Verdict
from engine.store import locks
from engine.store.database import ReadSession, WriteSession, server_clock
from engine.store.models import RolloutCommandRow, RolloutDecisionRow, RolloutRow


@dataclass(frozen=True, slots=True)
class Rollout:
    """A rollout as it stands. ``spec`` is frozen under ``spec_hash``; ``champion`` is what a rollback returns to."""

    id: int
    name: str
    spec: dict[str, Any]
    spec_hash: str
    canary: int
    champion: int
    actor: str
    state: RolloutState
    status: dict[str, Any]
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """One decision. ``evidence`` holds what it was made of and the guard table: replaying it gives the same verdict.

    What a person moved (a start, a cancelled draft) has neither evidence nor a fencing token: the token is 0.
    """

    rollout_id: int
    decided_at: datetime
    from_state: RolloutState
    to_state: RolloutState
    verdict: Verdict
    reason: str
    action: str
    generation: int | None
    command_id: int | None
    fencing_token: int
    status_before: dict[str, Any]
    evidence: dict[str, Any]
    id: int | None = None


def moved_by_hand(
    rollout_id: int,
    from_state: RolloutState,
    to_state: RolloutState,
    reason: str,
    now: datetime,
    *,
    canary: int,
    champion: int,
) -> DecisionRecord:
    """The record of a transition that somebody made without the controller."""
    return DecisionRecord(
        rollout_id=rollout_id,
        decided_at=now,
        from_state=from_state,
        to_state=to_state,
        verdict=Verdict.INSUFFICIENT,
        reason=reason,
        action="none",
        generation=None,
        command_id=None,
        fencing_token=0,
        status_before={"canary": canary, "champion": champion},
        evidence={},
    )


def create(
    session: WriteSession,
    *,
    name: str,
    spec: dict[str, Any],
    spec_hash: str,
    canary: int,
    champion: int,
    actor: str,
    state: RolloutState,
    status: dict[str, Any],
    created_at: datetime,
) -> Rollout:
    """Write a rollout down. One may be at work: a second canary would share its control's traffic. A draft waits."""
    if state is not RolloutState.DRAFT:
        _alone(session)
    row = RolloutRow(
        name=name,
        spec=spec,
        spec_hash=spec_hash,
        canary=canary,
        champion=champion,
        actor=actor,
        state=state.value,
        status=status,
        created_at=created_at,
        updated_at=created_at,
    )
    session.add(row)
    session.flush()
    return _rollout(row)


def release(
    session: WriteSession,
    rollout_id: int,
    *,
    champion: int,
    state: RolloutState,
    status: dict[str, Any],
    reason: str,
    now: datetime,
) -> Rollout:
    """Begin a rollout that was written down as a draft, against what is champion now."""
    _alone(session)
    row = session.get(RolloutRow, rollout_id, with_for_update=True)
    if row is None:
        raise SlipstreamError(f"There is no rollout {rollout_id}. `slipstream rollout list` shows them.")
    if row.state != RolloutState.DRAFT.value:
        raise SlipstreamError(f"Rollout {rollout_id} is {row.state}, not a draft: it was started before.")
    asked = session.scalar(select(func.max(RolloutCommandRow.id)).where(RolloutCommandRow.rollout_id == rollout_id))
    status = status | {"last_command": asked or 0}  # what was asked of a draft must not strike what begins now
    moved = moved_by_hand(row.id, RolloutState.DRAFT, state, reason, now, canary=row.canary, champion=champion)
    row.champion, row.state, row.status, row.updated_at = champion, state.value, status, now
    _write_down(session, moved)
    session.flush()
    return _rollout(row)


def _alone(session: WriteSession) -> None:
    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": locks.ROLLOUTS})
    running = active(session)
    if running is not None:
        raise SlipstreamError(
            f"Rollout {running.id} ({running.name}, v{running.canary}) is {running.state}; one runs at a time. "
            f"Wait for it, or end it: slipstream rollout abort {running.id} --reason …"
        )


def get(session: ReadSession | WriteSession, rollout_id: int, for_update: bool = False) -> Rollout | None:
    """A rollout by its number; ``for_update``: as it stands now, and nobody else moves it in this transaction."""
    row = session.get(RolloutRow, rollout_id, with_for_update=for_update or None, populate_existing=for_update)
    return _rollout(row) if row else None


def list_rollouts(session: ReadSession | WriteSession, limit: int = 200) -> list[Rollout]:
    """Newest first."""
    return [_rollout(row) for row in session.scalars(select(RolloutRow).order_by(RolloutRow.id.desc()).limit(limit))]


def at_work(session: ReadSession | WriteSession, since: datetime, until: datetime) -> list[Rollout]:
    """Every rollout of the window, as it stands: newest first."""
    query = select(RolloutRow).where(*at_work_in(since, until)).order_by(RolloutRow.id.desc())
    return [_rollout(row) for row in session.scalars(query)]


def at_work_in(since: datetime, until: datetime) -> tuple[ColumnElement[bool], ...]:
    """What rows of ``RolloutRow`` fulfil that were made before ``until`` and last changed at ``since`` or later."""
    return RolloutRow.created_at < until, RolloutRow.updated_at >= since


def active(session: ReadSession | WriteSession) -> Rollout | None:
    """The rollout that has begun and not ended, if there is one."""
    over = [state.value for state in TERMINAL_STATES | {RolloutState.DRAFT}]
    row = session.scalar(select(RolloutRow).where(RolloutRow.state.not_in(over)).order_by(RolloutRow.id).limit(1))
    return _rollout(row) if row else None


def cancel_draft(session: WriteSession, draft: Rollout, reason: str) -> None:
    """End a rollout that never began, here and now: no controller looks at a draft. The caller has it locked."""
    now, ended = server_clock(session), RolloutState.CANCELLED
    status = draft.status | {"state": ended.value, "since": now.isoformat(), "reason": reason}
    moved = moved_by_hand(
        draft.id, RolloutState.DRAFT, ended, reason, now, canary=draft.canary, champion=draft.champion
    )
    apply(session, draft.id, expected=RolloutState.DRAFT, state=ended, status=status, decision=moved, now=now)


def decisions(
    session: ReadSession | WriteSession, rollout_id: int, limit: int = 10_000, after: int = 0
) -> list[DecisionRecord]:
    """The newest ``limit`` decisions about a rollout that came after the decision ``after``, oldest first."""
    query = (
        select(RolloutDecisionRow)
        .where(RolloutDecisionRow.rollout_id == rollout_id, RolloutDecisionRow.id > after)
        .order_by(RolloutDecisionRow.id.desc())
        .limit(limit)
    )
    return [to_decision(row) for row in reversed(list(session.scalars(query)))]


def transitions(session: ReadSession | WriteSession, after: int, limit: int) -> list[DecisionRecord]:
    """Decisions about any rollout that changed its state, after the decision ``after``, oldest first."""
    query = (
        select(RolloutDecisionRow)
        .where(RolloutDecisionRow.id > after, RolloutDecisionRow.from_state != RolloutDecisionRow.to_state)
        .order_by(RolloutDecisionRow.id)
        .limit(limit)
    )
    return [to_decision(row) for row in session.scalars(query)]


def newest_decision(session: ReadSession | WriteSession) -> int:
    """The id of the last decision about any rollout; 0 before the first."""
    return session.scalar(select(func.max(RolloutDecisionRow.id))) or 0


def apply(
    session: WriteSession,
    rollout_id: int,
    *,
    expected: RolloutState,
    state: RolloutState,
    status: dict[str, Any],
    decision: DecisionRecord | None,
    now: datetime,
) -> None:
    """Write a rollout's new status and, where there is something to say, the decision that led to it.

    The caller holds the lease in this transaction. ``expected`` is the state the decision was made on.
    """
    changed = session.execute(
        update(RolloutRow)
        .where(RolloutRow.id == rollout_id, RolloutRow.state == expected.value)
        .values(state=state.value, status=status, updated_at=now)
        .returning(RolloutRow.id)
    ).first()
    if changed is None:
        raise SlipstreamError(f"Rollout {rollout_id} is no longer {expected}: somebody else moved it meanwhile.")
    if decision is not None:
        _write_down(session, decision)


def _write_down(session: WriteSession, decision: DecisionRecord) -> None:
    # Ids in the order of commits: who tells of decisions goes on after the last one told, one that came late is lost.
    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": locks.DECISIONS})
    session.add(
        RolloutDecisionRow(
            rollout_id=decision.rollout_id,
            decided_at=decision.decided_at,
            from_state=decision.from_state.value,
            to_state=decision.to_state.value,
            verdict=decision.verdict.value,
            reason=decision.reason,
            action=decision.action,
            generation=decision.generation,
            command_id=decision.command_id,
            fencing_token=decision.fencing_token,
            status_before=decision.status_before,
            evidence=decision.evidence,
        )
    )


def _rollout(row: RolloutRow) -> Rollout:
    return Rollout(
        id=row.id,
        name=row.name,
        spec=row.spec,
        spec_hash=row.spec_hash,
        canary=row.canary,
        champion=row.champion,
        actor=row.actor,
        state=RolloutState(row.state),
        status=row.status,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def to_decision(row: Any) -> DecisionRecord:
    return DecisionRecord(
        rollout_id=row.rollout_id,
        decided_at=row.decided_at,
        from_state=RolloutState(row.from_state),
        to_state=RolloutState(row.to_state),
        verdict=Verdict(row.verdict),
        reason=row.reason,
        action=row.action,
        generation=row.generation,
        command_id=row.command_id,
        fencing_token=row.fencing_token,
        status_before=row.status_before,
        evidence=row.evidence,
        id=row.id,
    )
