"""What a canary would have earned on requests that others served

Revision ID: 0015
Revises: 0014
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "shadow_requests",
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("trace_id", sa.Uuid(), nullable=False),
        sa.Column("arm", sa.Text(), nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=False),
        sa.Column("traffic_class", sa.Text(), nullable=False),
        sa.Column("assignment_key", sa.Text(), nullable=False),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in ("steps", "drafted", "accepted")),
        sa.Column("draft_s", sa.Double(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("generation", "trace_id", "arm", name=op.f("pk_shadow_requests")),
    )
    op.create_index("ix_shadow_requests_seen_at", "shadow_requests", ["seen_at"])


def downgrade() -> None:
    op.drop_table("shadow_requests")
