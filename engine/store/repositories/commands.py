"""What people ask of a rollout: hold, resume, promote, abort. The controller obeys, once each."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select, text
from sqlalchemy.dialects.postgresql import insert

from engine.contracts import TERMINAL_STATES, RolloutState, SlipstreamError
from engine.store import locks
from engine.store.database import ReadSession, WriteSession
from engine.store.models import RolloutCommandRow
from engine.store.repositories import rollouts

VERBS = ("hold", "resume", "promote", "abort")


@dataclass(frozen=True, slots=True)
class Command:
    """What a person asked for, once."""

    id: int
    rollout_id: int
    verb: str
    actor: str
    reason: str
    created_at: datetime


def ask(
    session: WriteSession, rollout_id: int, verb: str, actor: str, reason: str, idempotency_key: str | None = None
) -> Command:
    """Ask the controller for something. A key that was used before gives the command it made.

    No controller looks at a draft: an abort cancels it here and now, and nothing else can be asked of it.
    """
    if verb not in VERBS:
        raise SlipstreamError(f"A rollout knows no command {verb!r}; it knows {', '.join(VERBS)}.")
    rollout = rollouts.get(session, rollout_id)
    if rollout is None:
        raise SlipstreamError(f"There is no rollout {rollout_id}. `slipstream rollout list` shows them.")
    if idempotency_key is not None:
        made = session.scalar(select(RolloutCommandRow).where(RolloutCommandRow.idempotency_key == idempotency_key))
        if made is not None:
            return _command(made)
    if rollout.state in TERMINAL_STATES:
        raise SlipstreamError(f"Rollout {rollout_id} is {rollout.state}: it is over, and {verb} has nothing to act on.")
    if rollout.state is RolloutState.DRAFT:  # somebody may start it at this moment
        rollout = rollouts.get(session, rollout_id, for_update=True) or rollout
    if rollout.state is RolloutState.DRAFT:
        if verb != "abort":
            raise SlipstreamError(
                f"Rollout {rollout_id} is a draft, {verb} has nothing to act on. Begin it first: "
                f"slipstream rollout start --draft {rollout_id}"
            )
        rollouts.cancel_draft(session, rollout, f"cancelled by {actor}: {reason}")
    # Ids in the order of commits: the controller goes on after the last it obeyed, one that came late is lost.
    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": locks.COMMANDS})
    asked = {"rollout_id": rollout_id, "verb": verb, "actor": actor, "reason": reason}
    fill = insert(RolloutCommandRow).values(**asked, idempotency_key=idempotency_key)
    statement = fill.on_conflict_do_nothing(index_elements=["idempotency_key"])
    fresh = session.scalar(statement.returning(RolloutCommandRow))
    if fresh is None:  # the same key, committed by another session since we looked
        fresh = session.scalars(
            select(RolloutCommandRow).where(RolloutCommandRow.idempotency_key == idempotency_key)
        ).one()
    return _command(fresh)


def asked(session: ReadSession | WriteSession, rollout_id: int, after: int = 0) -> list[Command]:
    """What was asked of a rollout since the command ``after``, oldest first."""
    query = select(RolloutCommandRow).where(RolloutCommandRow.rollout_id == rollout_id, RolloutCommandRow.id > after)
    return [_command(row) for row in session.scalars(query.order_by(RolloutCommandRow.id))]


def _command(row: RolloutCommandRow) -> Command:
    return Command(row.id, row.rollout_id, row.verb, row.actor, row.reason, row.created_at)
