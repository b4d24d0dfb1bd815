"""Integer arrays of Postgres as numpy arrays."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import psycopg
from psycopg import postgres
from psycopg.adapt import Buffer, Loader
from psycopg.pq import Format
from psycopg.rows import tuple_row
from sqlalchemy import text

from engine.store.database import ReadSession


def fetch_arrays(session: ReadSession, query: str, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Rows whose integer arrays come as numpy arrays, in Postgres' binary format: no number becomes an object."""
    statement = text(query).bindparams(**parameters).compile(dialect=session.get_bind().dialect)
    connection = cast(psycopg.Connection[Any], session.connection().connection.driver_connection)
    with connection.cursor(binary=True, row_factory=tuple_row) as cursor:
        for name, loader in (("int2", _Int2Array), ("int4", _Int4Array)):
            cursor.adapters.register_loader(postgres.types[name].array_oid, loader)
        return cursor.execute(str(statement), statement.params).fetchall()


class _Array(Loader):
    """One-dimensional arrays without NULLs: 20 bytes of header, then each element behind its length."""

    format = Format.BINARY
    element: np.dtype[Any]

    def load(self, data: Buffer) -> np.ndarray:
        if len(data) < 20:
            return np.zeros(0, dtype=np.int16)
        # A copy: what psycopg hands out belongs to a result that is freed.
        return np.frombuffer(bytes(data), dtype=self.element, offset=20)["value"]


class _Int2Array(_Array):
    element = np.dtype([("length", ">i4"), ("value", ">i2")])


class _Int4Array(_Array):
    element = np.dtype([("length", ">i4"), ("value", ">i4")])
