"""Step time besides draft and verify, its cost by request, and what K control expected

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

COLUMNS = ("other_s", "cost_s", "plain_s", "expected_accepted")
TABLES = ("traces", "rollup_deltas", "rollups_minute", "rollups_ten_minutes", "rollups_hour", "rollups_day")


def upgrade() -> None:
    for table in TABLES:
        for name in COLUMNS:
            op.add_column(table, sa.Column(name, sa.Double(), nullable=False, server_default="0"))
            op.alter_column(table, name, server_default=None)


def downgrade() -> None:
    for table in reversed(TABLES):
        for name in reversed(COLUMNS):
            op.drop_column(table, name)
