"""What K control expected steps to cost and to save when it chose

Revision ID: 0020
Revises: 0019
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

COLUMNS = ("expected_plain_s", "expected_cost_s")
TABLES = ("traces", "rollup_deltas", "rollups_minute", "rollups_ten_minutes", "rollups_hour", "rollups_day")


def upgrade() -> None:
    for table in TABLES:
        for name in COLUMNS:
            op.add_column(table, sa.Column(name, sa.Double(), nullable=False, server_default="0"))


def downgrade() -> None:
    for table in reversed(TABLES):
        for name in reversed(COLUMNS):
            op.drop_column(table, name)
