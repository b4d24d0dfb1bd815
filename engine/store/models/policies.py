"""Draft-policy versions and the traffic that made them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Identity, Index, Integer, LargeBinary, SmallInteger
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from engine.store.models.base import NOW, Base


class PolicyVersionRow(Base):
    """An immutable draft policy. Writer: engine.registry.

    ``mlflow_*`` are set once, when the registry has answered; ``retired_*`` once, when it shall not be served again.
    """

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
    retired_at: Mapped[datetime | None]
    retired_reason: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class PolicyLineageRow(Base):
    """Which traces made a version: ``role`` is train or gate. Append-only. Writer: engine.registry.

    The traces are ordinals of ``learning_intake``, as ``engine.store.members`` packs them.
    """

    __tablename__ = "policy_lineage"
    version: Mapped[int] = mapped_column(ForeignKey("policy_versions.version"), primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)
    chunks: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))
    bits: Mapped[bytes] = mapped_column(LargeBinary)
    window_from: Mapped[datetime]
    window_to: Mapped[datetime]
    classes: Mapped[dict[str, Any]]
    __table_args__ = (Index("ix_policy_lineage_chunks", "chunks", postgresql_using="gin"),)
