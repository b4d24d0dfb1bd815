"""What all tests share: a tiny model, and a real Postgres started once with a fresh migrated database for each test."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from engine.model.loading import Target, load_target
from engine.ops import postgres
from engine.store import migrate
from engine.store.database import Database
from tests.app.hour import Hour, seeded_hour
from tests.databases import TEMPLATE, copied, with_database
from tests.tiny_model import write_tiny_model

ALSO_LONG = {"test_rollups.py", "test_slices.py"}
"""Files of a minute or two, though none of their tests is slow."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first: begun last, one of them would keep a single worker to the end."""
    long = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("browser")}
    items.sort(key=lambda item: item.path not in long and item.path.name not in ALSO_LONG)


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
    template = with_database(url, TEMPLATE)
    with psycopg.connect(url, autocommit=True) as connection:
        for careful in ("fsync", "full_page_writes"):  # of no use where the machine's end is the data's end too
            connection.execute(f"ALTER SYSTEM SET {careful} = off")
        connection.execute("SELECT pg_reload_conf()")
        connection.execute(f"CREATE DATABASE {TEMPLATE}")
    migrate.upgrade(template)
    return url


@pytest.fixture(scope="module")
def hour(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hour]:
    """The seeded hour that the tests of a file copy; made anew for each file, because it ages."""
    with seeded_hour(postgres_url, tmp_path_factory.mktemp("hour")) as made:
        yield made


@pytest.fixture
def database_url(postgres_url: str) -> Iterator[str]:
    """A fresh database with the newest schema."""
    with copied(postgres_url) as url:
        yield url


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    database = Database(database_url, application="tests")
    yield database
    database.close()
