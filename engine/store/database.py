"""Connections: where the database is, and sessions of two kinds.

``read`` sessions are read-only to Postgres itself, so a page or a report cannot write by mistake; a ``write`` session
is one transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, LiteralString

from sqlalchemy import Engine, create_engine, func, make_url, select
from sqlalchemy.orm import Session

from engine.store.connection import STATEMENT_TIMEOUT_S, arguments


class _Session(Session):
    def rows(self, statement: LiteralString, **values: Any) -> Sequence[Any]:
        """``engine.store.connection.Reads``: what the session was given before is in the database first."""
        self.flush()
        found = self.connection().exec_driver_sql(statement, values)
        return found.all() if found.returns_rows else ()


class ReadSession(_Session):
    """A session whose transaction Postgres refuses to write in."""


class WriteSession(_Session):
    """A session that commits once, at the end of its block, or not at all."""

    change = _Session.rows


class Database:
    """A connection pool and the two ways to use it. Safe to share between threads."""

    def __init__(
        self,
        url: str,
        pool_size: int = 4,
        application: str = "slipstream",
        statement_timeout_s: int = STATEMENT_TIMEOUT_S,
    ) -> None:
        self.url = sqlalchemy_url(url)
        self.engine: Engine = create_engine(
            self.url,
            pool_size=pool_size,
            max_overflow=8,
            pool_pre_ping=True,
            connect_args=arguments(application, statement_timeout_s),
        )
        self._reading = self.engine.execution_options(postgresql_readonly=True)  # what BEGIN says; no statement more

    @contextmanager
    def read(self) -> Iterator[ReadSession]:
        with ReadSession(self._reading) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[WriteSession]:
        with WriteSession(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def now(self) -> datetime:
        """The server's clock: whatever is compared between machines is measured by it."""
        with self.read() as session:
            return server_clock(session)

    @contextmanager
    def snapshot(self) -> Iterator[WriteSession]:
        """A write session all of whose statements see the moment of the first (REPEATABLE READ)."""
        with WriteSession(self.engine, expire_on_commit=False) as session, session.begin():
            session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            yield session

    def close(self) -> None:
        self.engine.dispose()


def server_clock(session: Session) -> datetime:
    """The server's clock at this moment, inside a transaction too."""
    return session.execute(select(func.clock_timestamp())).scalar_one()


def sqlalchemy_url(url: str) -> str:
    """``postgresql://…`` as SQLAlchemy wants it for psycopg 3."""
    for prefix in ("postgresql://", "postgres://", "postgresql+psycopg2://"):
        if url.startswith(prefix):
            return "postgresql+psycopg://" + url.removeprefix(prefix)
    return url


def without_password(url: str) -> str:
    """The address as it may be shown."""
    return make_url(url).render_as_string(hide_password=True)
