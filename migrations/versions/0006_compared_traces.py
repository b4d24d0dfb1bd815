"""An index of the requests that a rollout compares

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_traces_compared",
        "traces",
        ["generation", "written_at"],
        postgresql_where=sa.text("arm IN ('canary', 'control')"),
    )


def downgrade() -> None:
    op.drop_index("ix_traces_compared", "traces")
