"""What all tests share: a tiny model, and a real Postgres started once with a fresh migrated database for each test."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from engine.model.loading import Target, load_target
from engine.ops import postgres
from engine.store import migrate
from engine.store.database import Database
from tests.tiny_model import write_tiny_model

TEMPLATE = "slipstream_template"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A model of a few kilobytes in float64, so that nothing hangs on rounding."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder, seed=3)
    return load_target(str(folder), folder, dtype="float64", threads=1)


@pytest.fixture(scope="session")
def postgres_home() -> Iterator[Path]:
    """The data directory of an embedded server that runs for the whole session."""
    with tempfile.TemporaryDirectory(prefix="slipstream-tests-") as folder:
        home = Path(folder)
        home.chmod(0o755)  # as root the server runs as another user, which must get here
        postgres.start(home)
        try:
            yield home
        finally:
            postgres.stop(home)


@pytest.fixture(scope="session")
def postgres_url(postgres_home: Path) -> str:
    """The server, at a migrated database that others are copied from and nobody connects to."""
    url = postgres.running_url(postgres_home)
    assert url is not None
    template = _with_database(url, TEMPLATE)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {TEMPLATE}")
    migrate.upgrade(template)
    return url


@pytest.fixture
def database_url(postgres_url: str) -> Iterator[str]:
    """A fresh database with the newest schema."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    yield _with_database(postgres_url, name)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    database = Database(database_url, application="tests")
    yield database
    database.close()


def _with_database(url: str, name: str) -> str:
    return url.replace("/slipstream?", f"/{name}?")
