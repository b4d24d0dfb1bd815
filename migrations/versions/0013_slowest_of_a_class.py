"""The slowest requests of a class from an index, in place of the slowest of all

Revision ID: 0013
Revises: 0012
"""

from __future__ import annotations

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_traces_class_e2e", "traces", ["traffic_class", "e2e_s"])
    op.drop_index("ix_traces_e2e", table_name="traces")


def downgrade() -> None:
    op.create_index("ix_traces_e2e", "traces", ["e2e_s"])
    op.drop_index("ix_traces_class_e2e", table_name="traces")
