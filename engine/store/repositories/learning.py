"""The traces a learner may read, and the record of its attempts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import and_, func, select, update

from engine.contracts import Status
from engine.store.database import ReadSession, WriteSession
from engine.store.models import LearningAttemptRow, RolloutRow, TracePayloadRow, TraceRow

REGISTERED, REFUSED, ERROR = "registered", "refused", "error"


@dataclass(frozen=True, slots=True)
class TrainableTrace:
    """A finished response that may be learned from. ``max_tokens`` is the request's limit."""

    trace_id: UUID
    started_at: datetime
    written_at: datetime
    traffic_class: str
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of the learner; ``outcome`` is registered, refused or error, always with its reason."""

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


def new_trainable(session: ReadSession, model: str, since: datetime | None) -> int:
    """How many trainable traces of ``model`` were written after ``since``."""
    query = select(func.count()).select_from(TraceRow).where(*_trainable(model))
    if since is not None:
        query = query.where(TraceRow.written_at > since)
    return session.scalar(query) or 0


def recent_trainable(
    session: ReadSession, model: str, limit: int, after: datetime | None = None
) -> list[TrainableTrace]:
    """The newest ``limit`` trainable traces of ``model`` that have their tokens, newest first."""
    joined = and_(TracePayloadRow.started_at == TraceRow.started_at, TracePayloadRow.trace_id == TraceRow.trace_id)
    query = (
        select(
            TraceRow.trace_id,
            TraceRow.started_at,
            TraceRow.written_at,
            TraceRow.traffic_class,
            TracePayloadRow.prompt_ids,
            TracePayloadRow.output_ids,
            TraceRow.max_tokens,
        )
        .join(TracePayloadRow, joined)
        .where(*_trainable(model))
        .order_by(TraceRow.started_at.desc(), TraceRow.trace_id)
        .limit(limit)
    )
    if after is not None:
        query = query.where(TraceRow.written_at > after)
    return [TrainableTrace(*row) for row in session.execute(query)]


def record(session: WriteSession, attempt: Attempt) -> int:
    """Keep an attempt for ever; gives its id."""
    row = LearningAttemptRow(
        started_at=attempt.started_at,
        finished_at=attempt.finished_at,
        outcome=attempt.outcome,
        reason=attempt.reason,
        version=attempt.version,
        parent_version=attempt.parent_version,
        train_traces=attempt.train_traces,
        gate_traces=attempt.gate_traces,
        gate=attempt.gate,
        cpu_s=attempt.cpu_s,
        mlflow_run_id=attempt.mlflow_run_id,
    )
    session.add(row)
    session.flush()
    return row.id


def attempts(session: ReadSession | WriteSession, limit: int = 200) -> list[Attempt]:
    """Newest first."""
    query = select(LearningAttemptRow).order_by(LearningAttemptRow.id.desc()).limit(limit)
    return [_attempt(row) for row in session.scalars(query)]


def without_run(session: ReadSession | WriteSession, limit: int = 50) -> list[Attempt]:
    """Attempts that MLflow does not show yet, oldest first."""
    query = (
        select(LearningAttemptRow)
        .where(LearningAttemptRow.mlflow_run_id.is_(None))
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
    return None if tried else row.version


def _trainable(model: str) -> tuple[Any, ...]:
    return (
        TraceRow.trainable,
        TraceRow.status == Status.OK.value,
        TraceRow.output_tokens > 1,
        TraceRow.model == model,
    )


def _attempt(row: LearningAttemptRow) -> Attempt:
    return Attempt(
        started_at=row.started_at,
        finished_at=row.finished_at,
        outcome=row.outcome,
        reason=row.reason,
        train_traces=row.train_traces,
        gate_traces=row.gate_traces,
        gate=row.gate,
        cpu_s=row.cpu_s,
        version=row.version,
        parent_version=row.parent_version,
        mlflow_run_id=row.mlflow_run_id,
        id=row.id,
    )
