"""The newest decisions of one rollout, from an index

Revision ID: 0021
Revises: 0020
"""

from __future__ import annotations

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_rollout_decisions_rollout_id_id", "rollout_decisions", ["rollout_id", "id"])
    op.drop_index("ix_rollout_decisions_rollout_id", table_name="rollout_decisions")


def downgrade() -> None:
    op.create_index("ix_rollout_decisions_rollout_id", "rollout_decisions", ["rollout_id"])
    op.drop_index("ix_rollout_decisions_rollout_id_id", table_name="rollout_decisions")
