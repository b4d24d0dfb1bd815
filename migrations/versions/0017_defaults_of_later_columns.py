"""What the engines write without knowing of later columns is taken

While a release is rolled out, engines of the one before write into the new schema. A column they do not know has a
default, or every batch of theirs would be refused.

Revision ID: 0017
Revises: 0016
"""

from __future__ import annotations

from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

SUMS = ("other_s", "cost_s", "plain_s", "expected_accepted")
ROLLUPS = ("rollup_deltas", "rollups_minute", "rollups_ten_minutes", "rollups_hour", "rollups_day")
COLUMNS = {
    "traces": (*SUMS, "draft_errors"),
    "shadow_requests": ("draft_errors",),
    **dict.fromkeys(ROLLUPS, SUMS),
}


def upgrade() -> None:
    for table, columns in COLUMNS.items():
        for column in columns:
            op.alter_column(table, column, server_default="0")


def downgrade() -> None:
    for table, columns in COLUMNS.items():
        for column in columns:
            op.alter_column(table, column, server_default=None)
