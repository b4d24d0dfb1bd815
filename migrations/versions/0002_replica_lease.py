"""A replica says how long its lease is

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("engine_replicas", sa.Column("lease_s", sa.Float(), nullable=False, server_default="60"))
    op.alter_column("engine_replicas", "lease_s", server_default=None)  # each replica writes its own


def downgrade() -> None:
    op.drop_column("engine_replicas", "lease_s")
