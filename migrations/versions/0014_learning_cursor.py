"""How far the learner has looked through the traces

Revision ID: 0014
Revises: 0013
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "learning_cursor",
        sa.Column("one", sa.Boolean(), nullable=False),
        sa.Column("written_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("trace_id", sa.Uuid(), nullable=False),
        sa.CheckConstraint("one", name=op.f("ck_learning_cursor_one_row")),
        sa.PrimaryKeyConstraint("one", name=op.f("pk_learning_cursor")),
    )
    op.execute(
        "INSERT INTO learning_cursor"
        " SELECT true, written_at, trace_id FROM learning_intake ORDER BY ordinal DESC LIMIT 1"
    )


def downgrade() -> None:
    op.drop_table("learning_cursor")
