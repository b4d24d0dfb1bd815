"""Bring a database to the newest schema, with the scripts in migrations/."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from alembic import command
from alembic.config import Config

from engine.store.database import sqlalchemy_url


def alembic_config(url: str) -> Config:
    """Alembic's configuration for a database, wherever the package is installed."""
    config = Config()
    config.set_main_option("script_location", str(Path(str(resources.files("migrations")))))
    config.set_main_option("sqlalchemy.url", sqlalchemy_url(url).replace("%", "%%"))
    return config


def upgrade(url: str) -> None:
    command.upgrade(alembic_config(url), "head")
