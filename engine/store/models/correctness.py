"""Outputs that were compared with the target's own."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import Index, Integer
from sqlalchemy.orm import Mapped, mapped_column

from engine.store.models.base import NOW, Base


class OutputAuditRow(Base):
    """How many greedy outputs one engine process has audited, and what it found. Writer: engine.server.

    Each row is the count as it stands, and whoever asks for an arm sums over writers. ``ties`` are tokens that differ
    from the target's own by no more than kernels do.
    """

    __tablename__ = "output_audits"
    generation: Mapped[int] = mapped_column(primary_key=True)
    policy_version: Mapped[int] = mapped_column(Integer, primary_key=True)
    arm: Mapped[str] = mapped_column(primary_key=True)
    traffic_class: Mapped[str] = mapped_column(primary_key=True)
    writer_id: Mapped[UUID] = mapped_column(primary_key=True)
    replica_id: Mapped[str]
    audited: Mapped[int]
    tokens: Mapped[int]
    ties: Mapped[int]
    mismatches: Mapped[int]
    updated_at: Mapped[datetime] = mapped_column(server_default=NOW)


class OutputMismatchRow(Base):
    """An output that is not the target's own: the evidence of a rollback. Append-only. Writer: engine.server.

    At output ``position`` ``served_token`` was served where the target says ``target_token``, ``gap`` apart in its
    logits; up to ``tie`` it would have been a tie.
    """

    __tablename__ = "output_mismatches"
    trace_id: Mapped[UUID] = mapped_column(primary_key=True)
    started_at: Mapped[datetime]
    found_at: Mapped[datetime] = mapped_column(server_default=NOW)
    replica_id: Mapped[str]
    policy_version: Mapped[int] = mapped_column(Integer)
    arm: Mapped[str]
    generation: Mapped[int]
    traffic_class: Mapped[str]
    position: Mapped[int] = mapped_column(Integer)
    served_token: Mapped[int] = mapped_column(Integer)
    target_token: Mapped[int] = mapped_column(Integer)
    gap: Mapped[float]
    tie: Mapped[float]
    __table_args__ = (Index("ix_output_mismatches_generation", "generation"),)
