"""Decisions about rollouts as pages look at them: without the counts they were made of, or the newest counts alone."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, func, or_, select, true

from engine.store.database import ReadSession, WriteSession
from engine.store.models import RolloutDecisionRow, RolloutRow
from engine.store.repositories.rollouts import DecisionRecord, at_work_in, to_decision


def verdicts(session: ReadSession | WriteSession, rollout_id: int, limit: int = 600) -> list[DecisionRecord]:
    """Decisions from the first to the newest, without the counts they were made of: what a page draws again and again.

    All of them, or about ``limit``: every so-many-th from the newest on, and whatever moved the rollout.
    """
    row = RolloutDecisionRow
    place = func.row_number().over(order_by=row.id.desc()) - 1
    turns = or_(row.from_state != row.to_state, row.action != "none")
    every = select(row.id, place.label("place"), func.count().over().label("n"), turns.label("turns"))
    numbered = every.where(row.rollout_id == rollout_id).subquery()
    nth = (numbered.c.n + limit - 1) // limit  # of whole numbers: rounded up
    kept = select(numbered.c.id).where(or_(numbered.c.turns, numbered.c.place % nth == 0))
    found = session.execute(_without_counts().where(row.id.in_(kept)).order_by(row.id))
    return [to_decision(one) for one in found]


def decided(session: ReadSession | WriteSession, since: datetime, until: datetime) -> list[DecisionRecord]:
    """Every decision of a window, without the counts: newest rollout first, oldest decision first."""
    row = RolloutDecisionRow
    query = _without_counts().where(row.decided_at >= since, row.decided_at < until)
    return [to_decision(found) for found in session.execute(query.order_by(row.rollout_id.desc(), row.id))]


def _without_counts() -> Select[Any]:
    columns = [column for column in RolloutDecisionRow.__table__.columns if column.name != "evidence"]
    return select(*columns, RolloutDecisionRow.evidence.op("-", is_comparison=False)("inputs").label("evidence"))


def newest_counts(session: ReadSession | WriteSession, rollout_id: int) -> list[dict[str, Any]]:
    """The segments of the last decision about a rollout that saw any."""
    return next((segments for _, segments in _newest_counts(session, RolloutRow.id == rollout_id)), [])


def newest_counts_at_work(
    session: ReadSession, since: datetime, until: datetime
) -> list[tuple[int, list[dict[str, Any]]]]:
    """The same of each rollout ``at_work`` whose decisions saw any, with its id, newest first."""
    return _newest_counts(session, *at_work_in(since, until))


def _newest_counts(
    session: ReadSession | WriteSession, *which: ColumnElement[bool]
) -> list[tuple[int, list[dict[str, Any]]]]:
    """One decision of each is read: the counts of all would be megabytes."""
    segments = RolloutDecisionRow.evidence["inputs"]["segments"]
    newest = (
        select(segments.label("segments"))
        .where(RolloutDecisionRow.rollout_id == RolloutRow.id, func.jsonb_array_length(segments) > 0)
        .order_by(RolloutDecisionRow.id.desc())
        .limit(1)
        .lateral()
    )
    query = select(RolloutRow.id, newest.c.segments).join(newest, true()).where(*which).order_by(RolloutRow.id.desc())
    return [(found.id, found.segments) for found in session.execute(query)]
