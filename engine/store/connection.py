"""How the database is reached, and statements written out.

A rollback typed in an emergency waits for the imports of its command, so the ledger is plain SQL and this module needs
psycopg and nothing else. The same statements run inside the sessions of `engine.store.database`, in their transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, LiteralString, Protocol

if TYPE_CHECKING:
    from psycopg import Connection

BOUNDS = "-c idle_in_transaction_session_timeout=30s -c lock_timeout=10s -c TimeZone=UTC"
"""Nobody holds the ledger's lock by falling asleep, nobody waits for it for ever: a rollback must get through."""
PLANNING = "-c jit=off"
"""What is asked here takes milliseconds: compiling a statement takes longer than running it."""
KEEPALIVE: dict[str, Any] = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
"""libpq's options: a server that has gone without a word is noticed in seconds."""
STATEMENT_TIMEOUT_S = 60


class Reads(Protocol):
    """A transaction that answers."""

    def rows(self, statement: LiteralString, **values: Any) -> Sequence[Any]:
        """The rows of one statement, columns as attributes; ``%(name)s`` stands where a value goes."""


class Writes(Reads, Protocol):
    """A transaction that may change something, and does so when it ends, or not at all."""

    def change(self, statement: LiteralString, **values: Any) -> Sequence[Any]:
        """Run one statement that changes something; its rows where it gives some."""


class Direct:
    """``Writes`` on a connection of psycopg itself."""

    def __init__(self, connection: Connection[Any]) -> None:
        self._connection = connection

    def rows(self, statement: LiteralString, **values: Any) -> Sequence[Any]:
        cursor = self._connection.execute(statement, values)
        return cursor.fetchall() if cursor.description is not None else ()

    change = rows


@contextmanager
def transaction(url: str, application: str) -> Iterator[Direct]:
    """One transaction on a connection of its own: committed at the end of the block, undone by an exception.

    psycopg.OperationalError where the database does not answer.
    """
    import psycopg
    from psycopg.rows import namedtuple_row

    with psycopg.connect(libpq_url(url), row_factory=namedtuple_row, **arguments(application)) as connection:
        yield Direct(connection)


def arguments(application: str, statement_timeout_s: int = STATEMENT_TIMEOUT_S) -> dict[str, Any]:
    """What every connection is opened with, in libpq's words."""
    return {
        "application_name": application,
        "connect_timeout": 5,
        "options": f"{BOUNDS} {PLANNING} -c statement_timeout={statement_timeout_s}s",
        **KEEPALIVE,
    }


def libpq_url(url: str) -> str:
    """SQLAlchemy's address as psycopg itself wants it."""
    return url.replace("postgresql+psycopg://", "postgresql://", 1)
