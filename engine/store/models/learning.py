"""What the learner has taken in, what tenants allow, and every attempt to make a version."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, Boolean, CheckConstraint, ForeignKey, Identity, Index, Integer
from sqlalchemy.orm import Mapped, mapped_column

from engine.store.models.base import NOW, Base


class LearningIntakeRow(Base):
    """A trace the learner may use, under an ordinal of its own; contiguous, in the order it was taken in.

    ``held_out`` says on which side of the split its request lies, for ever. ``position`` counts the traces of its
    model, class and side. The row outlives the trace: ``forgotten_at`` is set when its tenant is forgotten, and
    nothing learns from it again. Writer: engine.learner.
    """

    __tablename__ = "learning_intake"
    ordinal: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    trace_id: Mapped[UUID] = mapped_column(unique=True)
    started_at: Mapped[datetime]
    written_at: Mapped[datetime]
    model: Mapped[str]
    tenant: Mapped[str | None]
    traffic_class: Mapped[str]
    request_hash: Mapped[int] = mapped_column(BigInteger)
    held_out: Mapped[bool] = mapped_column(Boolean)
    position: Mapped[int]
    max_tokens: Mapped[int] = mapped_column(Integer)
    forgotten_at: Mapped[datetime | None]
    __table_args__ = (
        Index("ix_learning_intake_request_hash", "request_hash"),
        Index("ix_learning_intake_tenant", "tenant"),
        Index("ix_learning_intake_side_ordinal", "model", "held_out", "ordinal"),
        Index("ix_learning_intake_class_position", "model", "traffic_class", "held_out", "position"),
        Index("ix_learning_intake_class_trace_id", "model", "traffic_class", "held_out", "trace_id"),
    )


class LearningCursorRow(Base):
    """How far the learner has looked through the traces: the last one in the order of writing, taken in or passed over.

    One row. Writer: engine.learner.
    """

    __tablename__ = "learning_cursor"
    one: Mapped[bool] = mapped_column(Boolean, primary_key=True)
    written_at: Mapped[datetime]
    trace_id: Mapped[UUID]
    __table_args__ = (CheckConstraint("one", name="one_row"),)


class TenantSettingRow(Base):
    """What a tenant allows; one without a row allows learning. Writer: engine.learner, for the command line."""

    __tablename__ = "tenant_settings"
    tenant: Mapped[str] = mapped_column(primary_key=True)
    train: Mapped[bool] = mapped_column(Boolean)
    actor: Mapped[str]
    updated_at: Mapped[datetime] = mapped_column(server_default=NOW)


class LearningAttemptRow(Base):
    """One try of the learner, with its reason when refused. Append-only, the run id apart. Writer: engine.learner.

    ``through`` is the last ordinal that had been taken in. ``cpu_s`` is the whole attempt; ``learn_cpu_s``,
    ``gate_cpu_s`` and ``export_cpu_s`` are its parts.
    """

    __tablename__ = "learning_attempts"
    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime]
    outcome: Mapped[str]  # registered | refused | error
    reason: Mapped[str]
    version: Mapped[int | None] = mapped_column(ForeignKey("policy_versions.version"))
    parent_version: Mapped[int | None] = mapped_column(ForeignKey("policy_versions.version"))
    train_traces: Mapped[int]
    gate_traces: Mapped[int]
    gate: Mapped[dict[str, Any]]
    through: Mapped[int] = mapped_column(server_default="0")
    cpu_s: Mapped[float]
    learn_cpu_s: Mapped[float] = mapped_column(server_default="0")
    gate_cpu_s: Mapped[float] = mapped_column(server_default="0")
    export_cpu_s: Mapped[float] = mapped_column(server_default="0")
    mlflow_run_id: Mapped[str | None]
