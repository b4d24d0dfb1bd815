"""Connections: where the database is, and sessions of two kinds.

``read`` sessions are read-only to Postgres itself, so a page or a report cannot write by mistake; a ``write`` session
is one transaction.
"""

from __future__ import annotations

import select as sockets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, LiteralString

import psycopg
from psycopg.rows import namedtuple_row
from sqlalchemy import Engine, create_engine, func, make_url, select
from sqlalchemy.orm import Session

from engine.store.connection import STATEMENT_TIMEOUT_S, Direct, arguments, libpq_url


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
        self._arguments = arguments(application, statement_timeout_s)
        self.engine: Engine = create_engine(
            self.url,
            pool_size=pool_size,
            max_overflow=8,
            pool_pre_ping=True,
            connect_args=self._arguments,
        )
<<<<<<< HEAD
        self._open: psycopg.Connection[Any] | None = None
        self._one_at_a_time = threading.Lock()
=======
        self._reading = self.engine.execution_options(postgresql_readonly=True)  # what BEGIN says; no statement more
>>>>>>> 28b1e8e (Dashboard and learner give way: SCHED_IDLE in the system's one session; reads begin read-only)

    @contextmanager
    def read(self) -> Iterator[ReadSession]:
        with ReadSession(self._reading) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[WriteSession]:
        with WriteSession(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def statements(self) -> Iterator[Direct]:
        """Each statement is a transaction by itself, and one round trip: on a connection that stays open between
        blocks. One block at a time. psycopg's own errors, unwrapped."""
        with self._one_at_a_time:
            if self._open is not None and (self._open.closed or _spoken_to(self._open)):
                self._open.close()
                self._open = None
            if self._open is None:
                self._open = psycopg.connect(
                    libpq_url(self.url), autocommit=True, row_factory=namedtuple_row, **self._arguments
                )
            yield Direct(self._open)

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
        if self._open is not None:
            self._open.close()


def _spoken_to(connection: psycopg.Connection[Any]) -> bool:
    """Whether the server said something that nobody asked for, as it does when it ends."""
    return bool(sockets.select([connection.fileno()], [], [], 0)[0])


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
