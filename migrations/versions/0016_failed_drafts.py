"""How often the draft of a request failed, served and in shadow

Revision ID: 0016
Revises: 0015
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None
TABLES = ("traces", "shadow_requests")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("draft_errors", sa.Integer(), server_default="0", nullable=False))
        op.alter_column(table, "draft_errors", server_default=None)  # of rows from before it is not known: none


def downgrade() -> None:
    for table in TABLES:
        op.drop_column(table, "draft_errors")
