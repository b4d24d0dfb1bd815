"""The ledger of serving plans and what the replicas say of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    ForeignKey,
    Integer,
    Text,
    func,
)
from sqlalchemy.orm import Mapped, mapped_column

from engine.store.models.base import Base


class ServingPlanRow(Base):
    """The ledger. Append-only, one row per change of what is served. Writer: engine.store.repositories.plans.append."""

    __tablename__ = "serving_plans"
    generation: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    champion: Mapped[int] = mapped_column(ForeignKey("policy_versions.version"))
    fallback: Mapped[int] = mapped_column(ForeignKey("policy_versions.version"))
    rollback_to: Mapped[int | None] = mapped_column(ForeignKey("policy_versions.version"))
    arms: Mapped[list[Any]]
    traffic_classes: Mapped[list[str] | None] = mapped_column(ARRAY(Text))
    tenants: Mapped[list[str] | None] = mapped_column(ARRAY(Text))
    slices: Mapped[list[str] | None] = mapped_column(ARRAY(Text))
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
    lease_s: Mapped[float]
    stats: Mapped[dict[str, Any]]


class PlanObservationRow(Base):
    """When a replica began to route by a generation, and what of it could not be loaded. Writer: engine.server."""

    __tablename__ = "plan_observations"
    replica_id: Mapped[str] = mapped_column(primary_key=True)
    generation: Mapped[int] = mapped_column(primary_key=True)
    observed_at: Mapped[datetime]
    load_s: Mapped[float]
    error: Mapped[str | None]
