"""The decisions of a window, of all rollouts, from an index

Revision ID: 0019
Revises: 0018
"""

from __future__ import annotations

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_rollout_decisions_decided_at", "rollout_decisions", ["decided_at"])


def downgrade() -> None:
    op.drop_index("ix_rollout_decisions_decided_at", table_name="rollout_decisions")
