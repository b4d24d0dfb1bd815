"""What was tried, what was decided about it, and what that cost the people who run it."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

from engine.store.database import ReadSession
from engine.store.panels.traffic import Rows
from engine.store.repositories import decisions as history
from engine.store.repositories import operations, rollouts
from engine.store.repositories.overview import Slice


def tried(session: ReadSession, part: Slice) -> Rows:
    """The rollouts that were at work in the window, newest first, as they stand."""
    return [
        {
            "id": one.id,
            "name": one.name,
            "canary": one.canary,
            "champion": one.champion,
            "state": one.state.value,
            "actor": one.actor,
            "created_at": one.created_at,
            "updated_at": one.updated_at,
            "reason": one.status.get("reason", ""),
            "spec_hash": one.spec_hash,
        }
        for one in rollouts.at_work(session, part.since, part.until)
    ]


def decisions(session: ReadSession, part: Slice) -> Rows:
    """Every decision of the window, with the guards as they were judged: newest rollout first, oldest first."""
    return [
        {
            "at": one.decided_at,
            "rollout": one.rollout_id,
            "from_state": one.from_state.value,
            "to_state": one.to_state.value,
            "verdict": one.verdict.value,
            "action": one.action,
            "reason": one.reason,
            "generation": one.generation,
            "guards": one.evidence.get("guards", []),
        }
        for one in history.decided(session, part.since, part.until)
    ]


def counts(session: ReadSession, part: Slice) -> Rows:
    """By rollout, arm and class (null: all of them) what the last decision about it was made of."""
    return [
        {"rollout": number} | segment
        for number, segments in history.newest_counts_at_work(session, part.since, part.until)
        for segment in segments
    ]


def weeks(session: ReadSession, part: Slice) -> Rows:
    """What changing drafts cost, a row a week that has a part in the window, oldest first; canary hours of what is not
    over up to this moment."""
    first = part.since - operations.WEEK
    found = operations.weeks(session, first, datetime.now(UTC))
    return [asdict(week) | {"failure_rate": week.failure_rate} for week in found if first < week.week < part.until]
