"""Outputs that were compared with the target's own

Revision ID: 0012
Revises: 0011
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "output_audits",
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=False),
        sa.Column("arm", sa.Text(), nullable=False),
        sa.Column("traffic_class", sa.Text(), nullable=False),
        sa.Column("writer_id", sa.Uuid(), nullable=False),
        sa.Column("replica_id", sa.Text(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in ("audited", "tokens", "ties", "mismatches")),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint(
            "generation", "policy_version", "arm", "traffic_class", "writer_id", name=op.f("pk_output_audits")
        ),
    )
    op.create_table(
        "output_mismatches",
        sa.Column("trace_id", sa.Uuid(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("found_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("replica_id", sa.Text(), nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=False),
        sa.Column("arm", sa.Text(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("traffic_class", sa.Text(), nullable=False),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in ("position", "served_token", "target_token")),
        *(sa.Column(name, sa.Double(), nullable=False) for name in ("gap", "tie")),
        sa.PrimaryKeyConstraint("trace_id", name=op.f("pk_output_mismatches")),
    )
    op.create_index("ix_output_mismatches_generation", "output_mismatches", ["generation"])


def downgrade() -> None:
    op.drop_table("output_mismatches")
    op.drop_table("output_audits")
