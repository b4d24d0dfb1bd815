"""How many traces MLflow has refused

Revision ID: 0010
Revises: 0009
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("export_cursors", sa.Column("refused", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    op.drop_column("export_cursors", "refused")
