"""What every command starts from: the settings that were read once, and a database."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from engine.ops import postgres
from engine.settings import Settings

if TYPE_CHECKING:
    from engine.store.database import Database


def settings(context: typer.Context) -> Settings:
    found: Settings = context.find_root().obj
    return found


@contextmanager
def database(context: typer.Context, application: str = "slipstream cli") -> Iterator[Database]:
    """The database of these settings; it must run already."""
    from engine.store.database import Database

    opened = Database(postgres.database_url(settings(context)), pool_size=2, application=application)
    try:
        yield opened
    finally:
        opened.close()


def actor() -> str:
    """Who asks, for the ledger."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        return "cli"
