"""Plans that take tenants and named slices only

Revision ID: 0011
Revises: 0010
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("tenants", "slices"):
        op.add_column("serving_plans", sa.Column(name, sa.ARRAY(sa.Text()), nullable=True))


def downgrade() -> None:
    for name in ("tenants", "slices"):
        op.drop_column("serving_plans", name)
