"""How many traces MLflow has refused

Revision ID: 0009
Revises: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("export_cursors", sa.Column("refused", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    op.drop_column("export_cursors", "refused")
