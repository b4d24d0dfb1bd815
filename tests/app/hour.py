"""The seeded hour, made once and copied for each test that wants it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from engine.store.database import Database
from tests.app.seed import beat, seed
from tests.databases import copied


@dataclass(frozen=True)
class Hour:
    server_url: str
    name: str
    tokenizer: Path

    @contextmanager
    def copied(self) -> Iterator[str]:
        """A database with the hour in it and a replica that is alive now; its URL."""
        with copied(self.server_url, self.name) as url:
            db = Database(url, application="tests")
            beat(db, datetime.now(UTC), self.tokenizer)
            db.close()
            yield url


@contextmanager
def seeded_hour(server_url: str, folder: Path) -> Iterator[Hour]:
    """An hour that ends now; nobody stays connected to its database, so that it can be copied."""
    with copied(server_url) as url:
        db = Database(url, application="tests")
        seed(db, folder / "spill")
        db.close()
        yield Hour(server_url, str(db.engine.url.database), folder / "spill" / "tokenizer.json")
