"""Draft-policy versions, the traffic that made them, and every attempt to make one."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, Identity, Index, Integer, SmallInteger, Uuid
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from engine.store.models.base import NOW, Base


class PolicyVersionRow(Base):
    """An immutable draft policy. Writer: engine.registry. ``mlflow_*`` are set once, when the registry has answered."""

    __tablename__ = "policy_versions"
    version: Mapped[int] = mapped_column(Integer, Identity(always=True), primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str]
    num_speculative_tokens: Mapped[int] = mapped_column(SmallInteger)
    parent_version: Mapped[int | None] = mapped_column(ForeignKey("policy_versions.version"))
    manifest: Mapped[dict[str, Any]]
    gate: Mapped[dict[str, Any] | None]
    note: Mapped[str] = mapped_column(server_default="")
    mlflow_version: Mapped[str | None]
    mlflow_run_id: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class PolicyLineageRow(Base):
    """Which traces made a version: ``role`` is train or gate. Append-only. Writer: engine.registry."""

    __tablename__ = "policy_lineage"
    version: Mapped[int] = mapped_column(ForeignKey("policy_versions.version"), primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)
    trace_ids: Mapped[list[UUID]] = mapped_column(ARRAY(Uuid))
    window_from: Mapped[datetime]
    window_to: Mapped[datetime]
    classes: Mapped[dict[str, Any]]
    __table_args__ = (Index("ix_policy_lineage_trace_ids", "trace_ids", postgresql_using="gin"),)


class LearningAttemptRow(Base):
    """One try of the learner, with its reason when refused. Append-only, the run id apart. Writer: engine.learner."""

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
    cpu_s: Mapped[float]
    mlflow_run_id: Mapped[str | None]
