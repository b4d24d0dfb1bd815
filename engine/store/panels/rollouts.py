"""What was tried, what was decided about it, and what that cost the people who run it."""

from __future__ import annotations

from dataclasses import asdict

from engine.store.database import ReadSession
from engine.store.panels.traffic import Rows
from engine.store.repositories import operations, rollouts
from engine.store.repositories.overview import Slice
from engine.store.repositories.rollouts import Rollout


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
        for one in _within(session, part)
    ]


def decisions(session: ReadSession, part: Slice) -> Rows:
    """The decisions of the window about each of them, newest rollout first, oldest decision first: the newest 600 of a
    rollout, with the guards as they were judged."""
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
        for rollout in _within(session, part)
        for one in rollouts.verdicts(session, rollout.id)
        if part.since <= one.decided_at < part.until
    ]


def counts(session: ReadSession, part: Slice) -> Rows:
    """By rollout, arm and class (null: all of them) what the last decision about it was made of."""
    return [
        {"rollout": rollout.id} | segment
        for rollout in _within(session, part)
        for segment in rollouts.newest_counts(session, rollout.id)
    ]


def weeks(session: ReadSession, part: Slice) -> Rows:
    """What changing drafts cost, a row a week that has a part in the window, oldest first."""
    found = operations.weeks(session, part.since - operations.WEEK, part.until)
    return [asdict(week) | {"failure_rate": week.failure_rate} for week in found if week.week < part.until]


def _within(session: ReadSession, part: Slice) -> list[Rollout]:
    found = rollouts.list_rollouts(session)
    return [one for one in found if one.created_at < part.until and one.updated_at >= part.since]
