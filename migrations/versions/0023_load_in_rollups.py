"""Seconds of service in the rollups: what says how busy a replica was without a look at its traces

What was written before, and what the engines before this release write meanwhile, is not known: NaN, which a sum keeps.
`slipstream store rebuild-rollups` makes it known.

Revision ID: 0023
Revises: 0022
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

TABLES = ("rollup_deltas", "rollups_minute", "rollups_ten_minutes", "rollups_hour", "rollups_day")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("e2e_s", sa.Double(), nullable=False, server_default=sa.text("'NaN'")))


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_column(table, "e2e_s")
