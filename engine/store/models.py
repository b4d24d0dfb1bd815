"""The schema, as SQLAlchemy models. Alembic makes it; nothing else does.

Every table has one writer, named in its docstring. Append-only tables are never updated.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Text,
    Uuid,
    func,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        datetime: DateTime(timezone=True),
        str: Text,
        float: Double,
        int: BigInteger,
        dict[str, Any]: JSONB,
        list[Any]: JSONB,
        UUID: Uuid,
    }


NOW = func.now()


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
    """One try of the learner, with its reason when refused. Append-only. Writer: engine.learner."""

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


class ServingPlanRow(Base):
    """The ledger. Append-only, one row per change of what is served. Writer: engine.store.repositories.plans.append."""

    __tablename__ = "serving_plans"
    generation: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    champion: Mapped[int] = mapped_column(ForeignKey("policy_versions.version"))
    fallback: Mapped[int] = mapped_column(ForeignKey("policy_versions.version"))
    rollback_to: Mapped[int | None] = mapped_column(ForeignKey("policy_versions.version"))
    arms: Mapped[list[Any]]
    traffic_classes: Mapped[list[str] | None] = mapped_column(ARRAY(Text))
    salt: Mapped[str]
    actor: Mapped[str]
    reason: Mapped[str]
    rollout_id: Mapped[int | None]
    idempotency_key: Mapped[str | None] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class ReplicaRow(Base):
    """What each replica last said of itself. Writer: engine.server, one row per replica."""

    __tablename__ = "engine_replicas"
    replica_id: Mapped[str] = mapped_column(primary_key=True)
    address: Mapped[str]
    model: Mapped[str]
    started_at: Mapped[datetime]
    heartbeat_at: Mapped[datetime]
    observed_generation: Mapped[int | None]
    resident: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    stats: Mapped[dict[str, Any]]


class PlanObservationRow(Base):
    """When a replica began to route by a generation, or why it could not. Append-only. Writer: engine.server."""

    __tablename__ = "plan_observations"
    replica_id: Mapped[str] = mapped_column(primary_key=True)
    generation: Mapped[int] = mapped_column(primary_key=True)
    observed_at: Mapped[datetime]
    load_s: Mapped[float]
    error: Mapped[str | None]


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
    retry: Mapped[int] = mapped_column(SmallInteger)
    preemptions: Mapped[int] = mapped_column(SmallInteger)
    trainable: Mapped[bool] = mapped_column(Boolean)
    written_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    __table_args__ = (
        Index("ix_traces_written_at", "written_at"),
        Index("ix_traces_class_started", "traffic_class", "started_at"),
        Index("ix_traces_version_started", "policy_version", "started_at"),
        Index("ix_traces_trace_id", "trace_id"),
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


class RollupRow(Base):
    """Sums over one minute, version, arm, class, replica and generation. Readers sum rows of equal key.

    Writer: engine.telemetry, as deltas keyed by (writer_id, seq, ordinal).
    """

    __tablename__ = "rollups_minute"
    minute: Mapped[datetime] = mapped_column(primary_key=True)
    writer_id: Mapped[UUID] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    ordinal: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    policy_version: Mapped[int] = mapped_column(Integer)
    arm: Mapped[str]
    traffic_class: Mapped[str]
    replica_id: Mapped[str]
    generation: Mapped[int]
    requests: Mapped[int] = mapped_column(Integer)
    errors: Mapped[int] = mapped_column(Integer)
    cancelled: Mapped[int] = mapped_column(Integer)
    retries: Mapped[int] = mapped_column(Integer)
    prompt_tokens: Mapped[int]
    output_tokens: Mapped[int]
    steps: Mapped[int]
    drafted: Mapped[int]
    accepted: Mapped[int]
    drafted_per_pos: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))
    accepted_per_pos: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))
    draft_s: Mapped[float]
    verify_s: Mapped[float]
    decode_s: Mapped[float]


class RollupHistogramRow(Base):
    """Sparse log-bucket histograms (γ = 1.0202, 1 % error) of a rollup's latencies. Writer: engine.telemetry."""

    __tablename__ = "rollup_histograms"
    minute: Mapped[datetime] = mapped_column(primary_key=True)
    writer_id: Mapped[UUID] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    ordinal: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    metric: Mapped[str] = mapped_column(primary_key=True)  # ttft | tpot | e2e | queue
    policy_version: Mapped[int] = mapped_column(Integer)
    arm: Mapped[str]
    traffic_class: Mapped[str]
    replica_id: Mapped[str]
    generation: Mapped[int]
    idx: Mapped[list[int]] = mapped_column(ARRAY(SmallInteger))
    cnt: Mapped[list[int]] = mapped_column(ARRAY(Integer))


class RolloutRow(Base):
    """A rollout as it stands: the spec is frozen at creation, the status the controller's. Writer: engine.rollout."""

    __tablename__ = "rollouts"
    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    name: Mapped[str]
    spec: Mapped[dict[str, Any]]
    spec_hash: Mapped[str]
    canary: Mapped[int] = mapped_column(ForeignKey("policy_versions.version"))
    champion: Mapped[int] = mapped_column(ForeignKey("policy_versions.version"))
    actor: Mapped[str]
    state: Mapped[str]
    status: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class RolloutDecisionRow(Base):
    """Every decision with its evidence; replaying them gives the same verdicts. Append-only. Writer: engine.rollout."""

    __tablename__ = "rollout_decisions"
    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    rollout_id: Mapped[int] = mapped_column(ForeignKey("rollouts.id"), index=True)
    decided_at: Mapped[datetime]
    from_state: Mapped[str]
    to_state: Mapped[str]
    verdict: Mapped[str]
    reason: Mapped[str]
    action: Mapped[str]
    generation: Mapped[int | None]
    command_id: Mapped[int | None]
    fencing_token: Mapped[int]
    status_before: Mapped[dict[str, Any]]
    evidence: Mapped[dict[str, Any]]


class RolloutCommandRow(Base):
    """What people asked for: hold, resume, promote, abort. Append-only. Writer: store.repositories.rollouts.command."""

    __tablename__ = "rollout_commands"
    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    rollout_id: Mapped[int] = mapped_column(ForeignKey("rollouts.id"), index=True)
    verb: Mapped[str]
    actor: Mapped[str]
    reason: Mapped[str]
    idempotency_key: Mapped[str | None] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class LeaseRow(Base):
    """Who may act, and with which fencing token: it grows with every change of hands. Writer: engine.rollout."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    token: Mapped[int]
    expires_at: Mapped[datetime]


class ExportCursorRow(Base):
    """How far an exporter has come. Writer: engine.ops."""

    __tablename__ = "export_cursors"
    name: Mapped[str] = mapped_column(primary_key=True)
    written_at: Mapped[datetime | None]
    trace_id: Mapped[UUID | None]
    exported: Mapped[int] = mapped_column(server_default="0")
    skipped: Mapped[int] = mapped_column(server_default="0")
    error: Mapped[str | None]
    updated_at: Mapped[datetime]
