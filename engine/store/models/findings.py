"""What drift was found."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Identity, Index, Integer, text
from sqlalchemy.orm import Mapped, mapped_column

from engine.store.models.base import Base


class DriftFindingRow(Base):
    """One thing that changed: when, where, how large, how sure. Writer: engine.ops (housekeeping).

    While it lasts its row is brought up to date; ``ended_at`` says when it was no longer found. ``effect`` is in the
    unit that ``quantity`` has, ``statistic`` is what was compared with ``threshold``.
    """

    __tablename__ = "drift_findings"
    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    kind: Mapped[str]  # input | new_traffic | change_point | silent_death | slow_slide
    quantity: Mapped[str]
    traffic_class: Mapped[str | None]
    policy_version: Mapped[int | None] = mapped_column(Integer)
    found_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    since: Mapped[datetime]
    until: Mapped[datetime]
    reference_since: Mapped[datetime]
    reference_until: Mapped[datetime]
    effect: Mapped[float]
    statistic: Mapped[float]
    threshold: Mapped[float]
    requests: Mapped[int]
    detail: Mapped[str]
    __table_args__ = (
        Index("ix_drift_findings_open", "kind", "quantity", postgresql_where=text("ended_at IS NULL")),
        Index("ix_drift_findings_found_at", "found_at"),
    )
