"""What a rollout has counted so far, so that a tick costs what came since the last

Revision ID: 0018
Revises: 0017
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "comparisons",
        sa.Column("generation", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("cursors", JSONB(), nullable=False),
        sa.Column("totals", JSONB(), nullable=False),
        sa.PrimaryKeyConstraint("generation", name=op.f("pk_comparisons")),
    )
    op.create_table(
        "compared_keys",
        *(sa.Column(name, sa.BigInteger(), autoincrement=False, nullable=False) for name in ("comparison", "key")),
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("arm", "traffic_class")),
        *(
            sa.Column(name, sa.Integer(), nullable=False)
            for name in ("requests", "cancelled", "errors", "draft_errors", "timeouts", "retries")
        ),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in ("x", "y")),
        sa.Column("latencies", sa.ARRAY(sa.Integer()), nullable=False),
        sa.PrimaryKeyConstraint("comparison", "key", "arm", "traffic_class", name=op.f("pk_compared_keys")),
    )


def downgrade() -> None:
    op.drop_table("compared_keys")
    op.drop_table("comparisons")
