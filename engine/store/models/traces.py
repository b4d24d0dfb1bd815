"""Traces, their payloads, and how far exporters have come."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Boolean,
    CheckConstraint,
    Index,
    Integer,
    SmallInteger,
    func,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from engine.store.models.base import NOW, Base


class TraceRow(Base):
    """One request, whatever became of it. Partitioned by day. Writer: engine.telemetry."""

    __tablename__ = "traces"
    started_at: Mapped[datetime] = mapped_column(primary_key=True)
    trace_id: Mapped[UUID] = mapped_column(primary_key=True)
    request_id: Mapped[str]
    replica_id: Mapped[str]
    policy_version: Mapped[int] = mapped_column(Integer)
    arm: Mapped[str]
    generation: Mapped[int]
    traffic_class: Mapped[str]
    tenant: Mapped[str | None]
    assignment_key: Mapped[str]
    status: Mapped[str]
    finish_reason: Mapped[str | None]
    error: Mapped[str | None]
    model: Mapped[str]
    endpoint: Mapped[str]
    stream: Mapped[bool] = mapped_column(Boolean)
    temperature: Mapped[float]
    max_tokens: Mapped[int] = mapped_column(Integer)
    queue_s: Mapped[float | None]
    ttft_s: Mapped[float | None]
    tpot_s: Mapped[float | None]
    e2e_s: Mapped[float]
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    output_tokens: Mapped[int] = mapped_column(Integer)
    steps: Mapped[int] = mapped_column(Integer)
    drafted: Mapped[int] = mapped_column(Integer)
    accepted: Mapped[int] = mapped_column(Integer)
    drafted_per_pos: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    accepted_per_pos: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    prefill_s: Mapped[float]
    draft_s: Mapped[float]
    verify_s: Mapped[float]
    other_s: Mapped[float] = mapped_column(server_default="0")
    cost_s: Mapped[float] = mapped_column(server_default="0")
    plain_s: Mapped[float] = mapped_column(server_default="0")
    expected_accepted: Mapped[float] = mapped_column(server_default="0")
    expected_plain_s: Mapped[float] = mapped_column(server_default="0")
    expected_cost_s: Mapped[float] = mapped_column(server_default="0")
    retry: Mapped[int] = mapped_column(SmallInteger)
    preemptions: Mapped[int] = mapped_column(SmallInteger)
    draft_errors: Mapped[int] = mapped_column(Integer, server_default="0")
    trainable: Mapped[bool] = mapped_column(Boolean)
    written_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    __table_args__ = (
        Index("ix_traces_written_at", "written_at"),
        Index("ix_traces_class_started", "traffic_class", "started_at"),
        Index("ix_traces_version_started", "policy_version", "started_at"),
        Index("ix_traces_trace_id", "trace_id"),
        Index("ix_traces_class_e2e", "traffic_class", "e2e_s"),
        Index("ix_traces_failed", "started_at", postgresql_where=text("status <> 'ok'")),
        Index(  # what a rollout looks at on every tick, and nothing else
            "ix_traces_compared",
            "generation",
            "written_at",
            postgresql_where=text("arm IN ('canary', 'control')"),
        ),
        CheckConstraint("accepted <= drafted", name="accepted_le_drafted"),
        {"postgresql_partition_by": "RANGE (started_at)"},
    )


class TracePayloadRow(Base):
    """The tokens of one request. Partitioned by day, kept for less long. Writer: engine.telemetry.

    ``proposed`` holds the drafted tokens of all steps end to end; ``step_drafted``, ``step_accepted`` and
    ``step_emitted`` cut it into verify steps.
    """

    __tablename__ = "trace_payloads"
    started_at: Mapped[datetime] = mapped_column(primary_key=True)
    trace_id: Mapped[UUID] = mapped_column(primary_key=True)
    prompt_ids: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    output_ids: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    proposed: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    step_drafted: Mapped[list[int]] = mapped_column(ARRAY(SmallInteger))
    step_accepted: Mapped[list[int]] = mapped_column(ARRAY(SmallInteger))
    step_emitted: Mapped[list[int]] = mapped_column(ARRAY(SmallInteger))
    __table_args__ = (
        Index("ix_trace_payloads_trace_id", "trace_id"),
        {"postgresql_partition_by": "RANGE (started_at)"},
    )


class TraceBatchRow(Base):
    """Batches that have been written: what makes a replay of the spill file happen once. Writer: engine.telemetry."""

    __tablename__ = "trace_batches"
    writer_id: Mapped[UUID] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    records: Mapped[int] = mapped_column(Integer)
    written_at: Mapped[datetime] = mapped_column(server_default=NOW)


class ExportCursorRow(Base):
    """How far an exporter has come. Writer: housekeeping (engine.ops, engine.registry)."""

    __tablename__ = "export_cursors"
    name: Mapped[str] = mapped_column(primary_key=True)
    written_at: Mapped[datetime | None]
    trace_id: Mapped[UUID | None]
    exported: Mapped[int] = mapped_column(server_default="0")
    skipped: Mapped[int] = mapped_column(server_default="0")
    refused: Mapped[int] = mapped_column(server_default="0")
    error: Mapped[str | None]
    updated_at: Mapped[datetime]
