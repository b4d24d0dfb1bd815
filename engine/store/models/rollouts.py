"""Rollouts, their decisions, what people asked for, and who may act."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ARRAY, ForeignKey, Identity, Index, Integer, func
from sqlalchemy.orm import Mapped, mapped_column

from engine.store.models.base import Base


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
    __table_args__ = (Index("ix_rollout_decisions_rollout_id_id", "rollout_id", "id"),)
    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    rollout_id: Mapped[int] = mapped_column(ForeignKey("rollouts.id"))
    decided_at: Mapped[datetime] = mapped_column(index=True)
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
    """What people asked for: hold, resume, promote, abort. Append-only. Writer: store.repositories.commands."""

    __tablename__ = "rollout_commands"
    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    rollout_id: Mapped[int] = mapped_column(ForeignKey("rollouts.id"), index=True)
    verb: Mapped[str]
    actor: Mapped[str]
    reason: Mapped[str]
    idempotency_key: Mapped[str | None] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class NotificationCursorRow(Base):
    """How far a sink of notifications has come through the decisions. Writer: engine.rollout."""

    __tablename__ = "notification_cursors"
    sink: Mapped[str] = mapped_column(primary_key=True)
    decision_id: Mapped[int]
    tries: Mapped[int]
    next_at: Mapped[datetime]
    error: Mapped[str | None]


class LeaseRow(Base):
    """Who may act, and with which fencing token: it grows with every change of hands. Writer: engine.rollout."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    token: Mapped[int]
    expires_at: Mapped[datetime]


class ComparisonRow(Base):
    """What has been counted of canary and control since a stage began, and how far. Writer: engine.rollout.

    ``generation`` is that of the first stage that counts; ``cursors`` holds for the generation of each stage the last
    trace that was looked at (written_at, trace_id), ``totals`` is ``store.segments.Tally`` as JSON.
    """

    __tablename__ = "comparisons"
    generation: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    cursors: Mapped[dict[str, Any]]
    totals: Mapped[list[Any]]


class ComparedKeyRow(Base):
    """What the requests of one assignment key came to in one class, of the comparison at work. Writer: engine.rollout.

    ``key`` is its 64-bit hash; ``latencies`` holds triples (metric, bucket, requests) of ``store.segments.KeySums``.
    """

    __tablename__ = "compared_keys"
    comparison: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    key: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    arm: Mapped[str] = mapped_column(primary_key=True)
    traffic_class: Mapped[str] = mapped_column(primary_key=True)
    requests: Mapped[int] = mapped_column(Integer)
    cancelled: Mapped[int] = mapped_column(Integer)
    errors: Mapped[int] = mapped_column(Integer)
    draft_errors: Mapped[int] = mapped_column(Integer)
    timeouts: Mapped[int] = mapped_column(Integer)
    retries: Mapped[int] = mapped_column(Integer)
    x: Mapped[int]
    y: Mapped[int]
    latencies: Mapped[list[int]] = mapped_column(ARRAY(Integer))
