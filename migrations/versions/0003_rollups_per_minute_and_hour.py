"""Rollups per minute and per hour, made by a compactor of the writers' deltas

Revision ID: 0003
Revises: 0002
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

DELTAS = {"rollups_minute": "rollup_deltas", "rollup_histograms": "rollup_delta_histograms"}
NEW_SUMS = ("good", "preemptions")
INTEGERS = ("requests", "errors", "cancelled", "retries")
KEY = "policy_version, arm, traffic_class, replica_id, generation"
SUMS = (
    "requests, errors, cancelled, retries, prompt_tokens, output_tokens, steps, drafted, accepted, "
    "drafted_per_pos, accepted_per_pos, draft_s, verify_s, decode_s"
)


def upgrade() -> None:
    for old, new in DELTAS.items():
        op.rename_table(old, new)
        op.execute(f"ALTER TABLE {new} RENAME CONSTRAINT pk_{old} TO pk_{new}")
        op.alter_column(new, "minute", new_column_name="at")
    for name in NEW_SUMS:
        op.add_column("rollup_deltas", sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))
        op.alter_column("rollup_deltas", name, server_default=None)
    for name in INTEGERS:
        op.alter_column("rollup_deltas", name, type_=sa.BigInteger(), existing_nullable=False)
    _merged("rollups_minute", "rollup_histograms_minute", minute=True)
    _merged("rollups_hour", "rollup_histograms_hour", minute=False)


def downgrade() -> None:
    zero = "CAST('00000000-0000-0000-0000-000000000000' AS uuid), row_number() OVER (), 0"
    batch = "at, writer_id, seq, ordinal"
    op.execute(
        f"INSERT INTO rollup_deltas ({batch}, {KEY}, {SUMS}, good, preemptions) "
        f"SELECT at, {zero}, {KEY}, {SUMS}, good, preemptions FROM rollups_minute"
    )
    op.execute(
        f"INSERT INTO rollup_delta_histograms ({batch}, metric, {KEY}, idx, cnt) "
        f"SELECT at, {zero}, metric, {KEY}, idx, cnt FROM rollup_histograms_minute WHERE metric <> 'acceptance_length'"
    )
    for name in ("rollup_histograms_hour", "rollups_hour", "rollup_histograms_minute", "rollups_minute"):
        op.drop_table(name)
    for name in INTEGERS:
        op.alter_column("rollup_deltas", name, type_=sa.Integer(), existing_nullable=False)
    for name in NEW_SUMS:
        op.drop_column("rollup_deltas", name)
    for old, new in DELTAS.items():
        op.alter_column(new, "at", new_column_name="minute")
        op.execute(f"ALTER TABLE {new} RENAME CONSTRAINT pk_{new} TO pk_{old}")
        op.rename_table(new, old)


def _merged(sums: str, histograms: str, minute: bool) -> None:
    options = {"postgresql_partition_by": "RANGE (at)"} if minute else {}
    names = ["policy_version", "arm", "traffic_class", "replica_id", *(["generation"] if minute else [])]
    op.create_table(
        sums,
        *_key(minute),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in INTEGERS),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in NEW_SUMS),
        *(
            sa.Column(name, sa.BigInteger(), nullable=False)
            for name in ("prompt_tokens", "output_tokens", "steps", "drafted", "accepted")
        ),
        *(
            sa.Column(name, postgresql.ARRAY(sa.BigInteger()), nullable=False)
            for name in ("drafted_per_pos", "accepted_per_pos")
        ),
        *(sa.Column(name, sa.Double(), nullable=False) for name in ("draft_s", "verify_s", "decode_s")),
        sa.PrimaryKeyConstraint("at", *names, name=op.f(f"pk_{sums}")),
        **options,
    )
    op.create_table(
        histograms,
        sa.Column("metric", sa.Text(), nullable=False),
        *_key(minute),
        sa.Column("idx", postgresql.ARRAY(sa.SmallInteger()), nullable=False),
        sa.Column("cnt", postgresql.ARRAY(sa.Integer()), nullable=False),
        sa.PrimaryKeyConstraint("metric", "at", *names, name=op.f(f"pk_{histograms}")),
        **options,
    )


def _key(minute: bool) -> list[sa.Column[object]]:
    return [
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=False),
        sa.Column("arm", sa.Text(), nullable=False),
        sa.Column("traffic_class", sa.Text(), nullable=False),
        sa.Column("replica_id", sa.Text(), nullable=False),
        *([sa.Column("generation", sa.BigInteger(), nullable=False)] if minute else []),
    ]
