"""What a canary would have earned on requests that others served."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import Index, Integer
from sqlalchemy.orm import Mapped, mapped_column

from engine.store.models.base import NOW, Base


class ShadowRequestRow(Base):
    """One policy replayed over one served request, every draft counted whole. Writer: engine.server.

    ``arm`` is canary for the shadow and control for the champion, which is replayed over the same request;
    ``generation`` is of the plan with the shadow, ``draft_s`` what the policy's own drafting took, seconds,
    ``draft_errors`` how often it failed.
    """

    __tablename__ = "shadow_requests"
    generation: Mapped[int] = mapped_column(primary_key=True)
    trace_id: Mapped[UUID] = mapped_column(primary_key=True)
    arm: Mapped[str] = mapped_column(primary_key=True)
    policy_version: Mapped[int] = mapped_column(Integer)
    traffic_class: Mapped[str]
    assignment_key: Mapped[str]
    steps: Mapped[int] = mapped_column(Integer)
    drafted: Mapped[int] = mapped_column(Integer)
    accepted: Mapped[int] = mapped_column(Integer)
    draft_s: Mapped[float]
    draft_errors: Mapped[int] = mapped_column(Integer, server_default="0")
    seen_at: Mapped[datetime] = mapped_column(server_default=NOW)
    __table_args__ = (Index("ix_shadow_requests_seen_at", "seen_at"),)
