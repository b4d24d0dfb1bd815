"""A key weighs one in tokens per step: what running rollouts have counted is counted anew, from their traces

Revision ID: 0022
Revises: 0021
"""

from __future__ import annotations

from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Totals hold sums that cannot be turned into the new ones; without them and their cursors counting starts over."""
    op.execute("DELETE FROM comparisons")
    op.execute("DELETE FROM compared_keys")


def downgrade() -> None:
    upgrade()
