"""The record of the learner's attempts, and what it cost to learn."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, update

from engine.store.database import ReadSession, WriteSession
from engine.store.models import LearningAttemptRow, PolicyVersionRow, RolloutRow

REGISTERED, REFUSED, ERROR = "registered", "refused", "error"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of the learner; ``outcome`` is registered, refused or error, always with its reason.

    ``through`` is the last ordinal of the intake that was there. CPU seconds: ``cpu_s`` in all, of which learning,
    evaluation (the gate) and export (files, registry).
    """

    started_at: datetime
    finished_at: datetime
    outcome: str
    reason: str
    train_traces: int
    gate_traces: int
    gate: dict[str, Any]
    cpu_s: float
    version: int | None = None
    parent_version: int | None = None
    mlflow_run_id: str | None = None
    id: int | None = None
    through: int = 0
    learn_cpu_s: float = 0.0
    gate_cpu_s: float = 0.0
    export_cpu_s: float = 0.0


def record(session: WriteSession, attempt: Attempt) -> int:
    """Keep an attempt for ever; gives its id."""
    row = LearningAttemptRow(**{name: getattr(attempt, name) for name in _KEPT})
    session.add(row)
    session.flush()
    return row.id


def attempts(session: ReadSession | WriteSession, limit: int = 200) -> list[Attempt]:
    """Newest first."""
    query = select(LearningAttemptRow).order_by(LearningAttemptRow.id.desc()).limit(limit)
    return [_attempt(row) for row in session.scalars(query)]


def finished(session: ReadSession, since: datetime, until: datetime) -> list[Attempt]:
    """All that ended in [since, until), newest first."""
    ended = LearningAttemptRow.finished_at
    query = select(LearningAttemptRow).where(ended >= since, ended < until).order_by(LearningAttemptRow.id.desc())
    return [_attempt(row) for row in session.scalars(query)]


def looks(session: ReadSession | WriteSession) -> tuple[int, list[tuple[int, int]]]:
    """(``through`` of the newest attempt that passed, 0 before the first; ``through`` and held-out requests of every
    refused one since then that its gate compared with the champion, oldest first)."""
    row = LearningAttemptRow
    passed = select(row.id, row.through).where(row.outcome == REGISTERED).order_by(row.id.desc()).limit(1)
    last, through = session.execute(passed).one_or_none() or (0, 0)
    compared = func.jsonb_typeof(row.gate["overall"]) == "object"
    since = select(row.through, row.gate_traces).where(row.id > last, row.outcome == REFUSED, compared).order_by(row.id)
    return through, [(at, seen) for at, seen in session.execute(since)]


def outcomes(session: ReadSession) -> dict[str, int]:
    """Attempts by outcome, of all time."""
    query = select(LearningAttemptRow.outcome, func.count()).group_by(LearningAttemptRow.outcome)
    return dict(session.execute(query).all())


def without_run(session: ReadSession | WriteSession, but: Collection[int] = (), limit: int = 50) -> list[Attempt]:
    """Attempts that MLflow does not show yet, oldest first, without those of the ids in ``but``."""
    query = (
        select(LearningAttemptRow)
        .where(LearningAttemptRow.mlflow_run_id.is_(None), LearningAttemptRow.id.not_in(but))
        .order_by(LearningAttemptRow.id)
        .limit(limit)
    )
    return [_attempt(row) for row in session.scalars(query)]


def of_version(session: ReadSession | WriteSession, version: int) -> Attempt | None:
    """The attempt that made a version; None for one that was published without the learner."""
    row = session.scalar(select(LearningAttemptRow).where(LearningAttemptRow.version == version).limit(1))
    return _attempt(row) if row else None


def set_run(session: WriteSession, attempt_id: int, run_id: str) -> None:
    """Record under which run MLflow shows an attempt; once, the rest of the row never changes."""
    session.execute(
        update(LearningAttemptRow)
        .where(LearningAttemptRow.id == attempt_id, LearningAttemptRow.mlflow_run_id.is_(None))
        .values(mlflow_run_id=run_id)
    )


def clear_runs(session: WriteSession) -> None:
    """Forget under which runs MLflow showed the attempts: it has lost them."""
    session.execute(update(LearningAttemptRow).values(mlflow_run_id=None))


def awaiting_rollout(session: ReadSession | WriteSession, champion: int) -> int | None:
    """The newest version that passed its gate against this champion and has not been tried on traffic yet.

    Only the newest counts: a rollout of an older one would try what the learner has already improved on.
    """
    row = session.scalar(
        select(LearningAttemptRow)
        .where(LearningAttemptRow.outcome == REGISTERED)
        .order_by(LearningAttemptRow.id.desc())
        .limit(1)
    )
    if row is None or row.version is None or row.parent_version != champion:
        return None
    tried = session.scalar(select(func.count()).select_from(RolloutRow).where(RolloutRow.canary == row.version))
    made = session.get(PolicyVersionRow, row.version)
    return None if tried or made is None or made.retired_at is not None else row.version


_KEPT = tuple(field.name for field in fields(Attempt) if field.name != "id")


def _attempt(row: LearningAttemptRow) -> Attempt:
    return Attempt(id=row.id, **{name: getattr(row, name) for name in _KEPT})
