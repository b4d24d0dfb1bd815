"""Connections: where the database is, and sessions of two kinds.

``read`` sessions are read-only to Postgres itself, so a page or a report cannot write by mistake; a ``write`` session
is one transaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, create_engine, func, make_url, select, text
from sqlalchemy.orm import Session

BOUNDS = "-c idle_in_transaction_session_timeout=30s -c lock_timeout=10s -c TimeZone=UTC"
"""Nobody holds the ledger's lock by falling asleep, nobody waits for it for ever: a rollback must get through."""
KEEPALIVE: dict[str, Any] = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
"""libpq's options: a server that has gone without a word is noticed in seconds."""


class ReadSession(Session):
    """A session whose transaction Postgres refuses to write in."""


class WriteSession(Session):
    """A session that commits once, at the end of its block, or not at all."""


class Database:
    """A connection pool and the two ways to use it. Safe to share between threads."""

    def __init__(
        self, url: str, pool_size: int = 4, application: str = "slipstream", statement_timeout_s: int = 60
    ) -> None:
        self.url = sqlalchemy_url(url)
        self.engine: Engine = create_engine(
            self.url,
            pool_size=pool_size,
            max_overflow=8,
            pool_pre_ping=True,
            connect_args={
                "application_name": application,
                "connect_timeout": 5,
                "options": f"{BOUNDS} -c statement_timeout={statement_timeout_s}s",
                **KEEPALIVE,
            },
        )

    @contextmanager
    def read(self) -> Iterator[ReadSession]:
        with ReadSession(self.engine) as session:
            session.execute(text("SET TRANSACTION READ ONLY"))
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


def libpq_url(url: str) -> str:
    """The same address as psycopg itself wants it."""
    return url.replace("postgresql+psycopg://", "postgresql://", 1)
