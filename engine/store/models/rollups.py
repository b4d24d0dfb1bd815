"""Rollups: what the writer adds per batch, and what the compactor makes of it per minute, ten minutes, hour and day.

A delta is taken out of its table in the statement that adds it to every resolution, so at every moment a reader of any
resolution sums the rows of that resolution and the deltas that are left.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import ARRAY, BigInteger, Integer, SmallInteger, text
from sqlalchemy.orm import Mapped, mapped_column

from engine.store.models.base import Base


class Sums:
    """Counts and seconds over some requests; nothing here is a ratio.

    ``good`` are the requests that ended well within the operator's objectives for TTFT and TPOT, as these were when the
    request was written or its rollup rebuilt. Positions are those in the draft, 0-based. ``e2e_s`` is NaN where an
    engine wrote that did not sum it up.
    """

    requests: Mapped[int]
    errors: Mapped[int]
    cancelled: Mapped[int]
    retries: Mapped[int]
    preemptions: Mapped[int]
    good: Mapped[int]
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
    other_s: Mapped[float] = mapped_column(server_default="0")
    cost_s: Mapped[float] = mapped_column(server_default="0")
    plain_s: Mapped[float] = mapped_column(server_default="0")
    expected_accepted: Mapped[float] = mapped_column(server_default="0")
    expected_plain_s: Mapped[float] = mapped_column(server_default="0")
    expected_cost_s: Mapped[float] = mapped_column(server_default="0")
    e2e_s: Mapped[float] = mapped_column(server_default=text("'NaN'"))


class Buckets:
    """A sparse log-bucket histogram (γ = 1.0202, 1 % error): bucket indices ascending, and their counts."""

    idx: Mapped[list[int]] = mapped_column(ARRAY(SmallInteger))
    cnt: Mapped[list[int]] = mapped_column(ARRAY(Integer))


class BatchKey:
    """Which batch a delta came with: rows of one batch written twice are the same rows."""

    at: Mapped[datetime] = mapped_column(primary_key=True)  # the minute
    writer_id: Mapped[UUID] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    ordinal: Mapped[int] = mapped_column(SmallInteger, primary_key=True)


class Dimensions:
    """What a delta is about."""

    policy_version: Mapped[int] = mapped_column(Integer)
    arm: Mapped[str]
    traffic_class: Mapped[str]
    replica_id: Mapped[str]
    generation: Mapped[int]


class MinuteKey:
    at: Mapped[datetime] = mapped_column(primary_key=True, sort_order=-1)
    policy_version: Mapped[int] = mapped_column(Integer, primary_key=True)
    arm: Mapped[str] = mapped_column(primary_key=True)
    traffic_class: Mapped[str] = mapped_column(primary_key=True)
    replica_id: Mapped[str] = mapped_column(primary_key=True)
    generation: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class LongKey:
    """Without the generation: over long windows people ask for versions."""

    at: Mapped[datetime] = mapped_column(primary_key=True, sort_order=-1)
    policy_version: Mapped[int] = mapped_column(Integer, primary_key=True)
    arm: Mapped[str] = mapped_column(primary_key=True)
    traffic_class: Mapped[str] = mapped_column(primary_key=True)
    replica_id: Mapped[str] = mapped_column(primary_key=True)


class RollupDeltaRow(BatchKey, Dimensions, Sums, Base):
    """What one batch adds to one minute and key. Writer: engine.telemetry; the compactor takes rows out."""

    __tablename__ = "rollup_deltas"


class RollupDeltaHistogramRow(BatchKey, Dimensions, Buckets, Base):
    """What one batch adds to the histograms. Writer: engine.telemetry; the compactor takes rows out."""

    __tablename__ = "rollup_delta_histograms"
    metric: Mapped[str] = mapped_column(primary_key=True)  # ttft | tpot | e2e | queue | acceptance_length


class RollupMinuteRow(MinuteKey, Sums, Base):
    """One row a minute and key. Partitioned by day. Writer: engine.ops."""

    __tablename__ = "rollups_minute"
    __table_args__ = ({"postgresql_partition_by": "RANGE (at)"},)


class RollupMinuteHistogramRow(MinuteKey, Buckets, Base):
    """One histogram a minute, key and metric. Partitioned by day. Writer: engine.ops."""

    __tablename__ = "rollup_histograms_minute"
    metric: Mapped[str] = mapped_column(primary_key=True, sort_order=-2)
    __table_args__ = ({"postgresql_partition_by": "RANGE (at)"},)


class RollupTenMinutesRow(LongKey, Sums, Base):
    """One row per ten minutes and key. Writer: engine.ops."""

    __tablename__ = "rollups_ten_minutes"


class RollupTenMinutesHistogramRow(LongKey, Buckets, Base):
    """One histogram per ten minutes, key and metric. Writer: engine.ops."""

    __tablename__ = "rollup_histograms_ten_minutes"
    metric: Mapped[str] = mapped_column(primary_key=True, sort_order=-2)


class RollupHourRow(LongKey, Sums, Base):
    """One row an hour and key. Writer: engine.ops."""

    __tablename__ = "rollups_hour"


class RollupHourHistogramRow(LongKey, Buckets, Base):
    """One histogram an hour, key and metric. Writer: engine.ops."""

    __tablename__ = "rollup_histograms_hour"
    metric: Mapped[str] = mapped_column(primary_key=True, sort_order=-2)


class RollupDayRow(LongKey, Sums, Base):
    """One row a UTC day and key. Writer: engine.ops."""

    __tablename__ = "rollups_day"


class RollupDayHistogramRow(LongKey, Buckets, Base):
    """One histogram a UTC day, key and metric. Writer: engine.ops."""

    __tablename__ = "rollup_histograms_day"
    metric: Mapped[str] = mapped_column(primary_key=True, sort_order=-2)
