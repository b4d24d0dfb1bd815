"""Findings of drift

Revision ID: 0008
Revises: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "drift_findings",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("quantity", sa.Text(), nullable=False),
        sa.Column("traffic_class", sa.Text(), nullable=True),
        sa.Column("policy_version", sa.Integer(), nullable=True),
        sa.Column("found_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        *(
            sa.Column(name, sa.DateTime(timezone=True), nullable=False)
            for name in ("since", "until", "reference_since", "reference_until")
        ),
        *(sa.Column(name, sa.Double(), nullable=False) for name in ("effect", "statistic", "threshold")),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_drift_findings")),
    )
    open_ones = sa.text("ended_at IS NULL")
    op.create_index("ix_drift_findings_open", "drift_findings", ["kind", "quantity"], postgresql_where=open_ones)
    op.create_index("ix_drift_findings_found_at", "drift_findings", ["found_at"])


def downgrade() -> None:
    op.drop_table("drift_findings")
