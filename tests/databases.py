"""Databases of the tests: each is copied from a template and dropped at its end."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

TEMPLATE = "slipstream_template"
"""The newest schema and no row."""


@contextmanager
def copied(server_url: str, template: str = TEMPLATE) -> Iterator[str]:
    """A database with what the template holds; its URL."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        # Its files are copied: by default each page goes through the write-ahead log.
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
    try:
        yield with_database(server_url, name)
    finally:
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def with_database(server_url: str, name: str) -> str:
    return server_url.replace("/slipstream?", f"/{name}?")
