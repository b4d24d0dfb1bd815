"""Alembic's entry: the models are the truth, partitions are data."""

from __future__ import annotations

from typing import Any

from alembic import context
from sqlalchemy import create_engine, pool

from engine.store.database import sqlalchemy_url
from engine.store.models import Base
from engine.store.repositories.partitions import PARTITION_NAME


def include_name(name: str | None, type_: str, parent_names: Any) -> bool:
    """Daily partitions come and go; they are not schema. Nor is what another tool keeps beside ours."""
    if type_ == "table":
        return name in Base.metadata.tables and not PARTITION_NAME.match(name or "")
    return True


def run() -> None:
    url = context.config.get_main_option("sqlalchemy.url")
    if not url:
        from engine.settings import load_settings

        url = load_settings().database_url
    if not url:
        raise SystemExit("No database: set SLIPSTREAM_DATABASE_URL, or use `slipstream migrate` for the embedded one.")
    engine = create_engine(sqlalchemy_url(url), poolclass=pool.NullPool)
    with engine.connect() as connection:
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            include_name=include_name,
            compare_type=True,
            compare_server_default=True,
        )
        with context.begin_transaction():
            context.run_migrations()


run()
