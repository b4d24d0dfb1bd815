"""Rollups of ten minutes and of days; indexes under the list of traces: the slowest, and those that failed

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TIERS = ("ten_minutes", "day")
DIMENSIONS = "policy_version, arm, traffic_class, replica_id, generation"
SUMS = (
    *("requests", "errors", "cancelled", "retries", "preemptions", "good"),
    *("prompt_tokens", "output_tokens", "steps", "drafted", "accepted"),
)


def upgrade() -> None:
    for tier in TIERS:
        op.create_table(
            f"rollups_{tier}",
            *_key(),
            *(sa.Column(name, sa.BigInteger(), nullable=False) for name in SUMS),
            sa.Column("drafted_per_pos", postgresql.ARRAY(sa.BigInteger()), nullable=False),
            sa.Column("accepted_per_pos", postgresql.ARRAY(sa.BigInteger()), nullable=False),
            *(sa.Column(name, sa.Double(), nullable=False) for name in ("draft_s", "verify_s", "decode_s")),
            sa.PrimaryKeyConstraint(*(column.name for column in _key()), name=op.f(f"pk_rollups_{tier}")),
        )
        op.create_table(
            f"rollup_histograms_{tier}",
            sa.Column("metric", sa.Text(), nullable=False),
            *_key(),
            sa.Column("idx", postgresql.ARRAY(sa.SmallInteger()), nullable=False),
            sa.Column("cnt", postgresql.ARRAY(sa.Integer()), nullable=False),
            sa.PrimaryKeyConstraint(
                "metric", *(column.name for column in _key()), name=op.f(f"pk_rollup_histograms_{tier}")
            ),
        )
    # What is merged already becomes deltas again: the compactor then makes every tier of it.
    batch = "CAST('00000000-0000-0000-0000-000000000000' AS uuid), row_number() OVER (), 0"
    sums = ", ".join((*SUMS, "drafted_per_pos", "accepted_per_pos", "draft_s", "verify_s", "decode_s"))
    op.execute(
        f"INSERT INTO rollup_deltas (at, writer_id, seq, ordinal, {DIMENSIONS}, {sums}) "
        f"SELECT at, {batch}, {DIMENSIONS}, {sums} FROM rollups_minute"
    )
    op.execute(
        f"INSERT INTO rollup_delta_histograms (at, writer_id, seq, ordinal, metric, {DIMENSIONS}, idx, cnt) "
        f"SELECT at, {batch}, metric, {DIMENSIONS}, idx, cnt FROM rollup_histograms_minute"
    )
    op.execute("TRUNCATE rollups_minute, rollup_histograms_minute, rollups_hour, rollup_histograms_hour")
    op.create_index("ix_traces_e2e", "traces", ["e2e_s"])
    op.create_index("ix_traces_failed", "traces", ["started_at"], postgresql_where=sa.text("status <> 'ok'"))


def downgrade() -> None:
    op.drop_index("ix_traces_failed", table_name="traces")
    op.drop_index("ix_traces_e2e", table_name="traces")
    for tier in reversed(TIERS):
        op.drop_table(f"rollup_histograms_{tier}")
        op.drop_table(f"rollups_{tier}")


def _key() -> list[sa.Column[object]]:
    return [
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=False),
        sa.Column("arm", sa.Text(), nullable=False),
        sa.Column("traffic_class", sa.Text(), nullable=False),
        sa.Column("replica_id", sa.Text(), nullable=False),
    ]
