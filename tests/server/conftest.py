"""A whole server on the tiny model: real HTTP, real Postgres, the real engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from engine.model.loading import Target, load_target
from engine.server.main import EngineServer, ServerThread
from engine.settings import Settings, load_settings
from engine.store.database import Database
from engine.store.repositories import audit, plans
from tests.tiny_model import write_tiny_model
from tests.waiting import until


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(folder)
    return load_target(str(folder), folder.parent, "float64")


def settings_for(home: Path, database_url: str, *flags: str) -> Settings:
    chosen = load_settings(None, ["engine.port=0", f"home={home}", "engine.plan_poll_s=0.1", *flags], {})
    return chosen.model_copy(update={"database_url": database_url})


class Served:
    """A running server and the ways to talk to it."""

    def __init__(self, server: EngineServer, db: Database) -> None:
        self.server, self.db = server, db
        self.http = httpx.Client(base_url=server.url, timeout=30)
        self.openai = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)
        self.model = server.target.name

    def completion(self, **body: object) -> httpx.Response:
        base = {"model": self.model, "prompt": "hello", "max_tokens": 8, "temperature": 0.0}
        headers = body.pop("headers", {})
        return self.http.post("/v1/completions", json=base | body, headers=headers)  # type: ignore[arg-type]

    def traces(self, expected: int) -> None:
        """Wait until so many traces are in the table."""
        until(lambda: self.count() >= expected, f"{expected} traces, there are {self.count()}")

    def count(self) -> int:
        with self.db.read() as session:
            return audit.traces(session)

    def observes(self, generation: int) -> None:
        until(lambda: self.has_observed(generation), f"generation {generation} observed")

    def has_observed(self, generation: int) -> bool:
        with self.db.read() as session:
            return any(o.error is None for o in plans.observations(session, generation))


Start = Callable[..., Served]


@pytest.fixture
def start(target: Target, db: Database, database_url: str, tmp_path: Path) -> Iterator[Start]:
    """Start a server with these flags; it is stopped when the test ends."""
    running: list[ServerThread] = []

    def begin(*flags: str, ready: bool = True) -> Served:
        server = EngineServer(settings_for(tmp_path, database_url, *flags), target)
        thread = ServerThread(server)
        thread.start()
        running.append(thread)
        served = Served(server, db)
        answers = (200,) if ready else (200, 503)  # what is not asked to be ready may have become so already
        until(lambda: _readiness(served.http) in answers, f"/readyz says one of {answers}")
        return served

    yield begin
    for thread in running:
        thread.stop()


@pytest.fixture
def served(start: Start) -> Served:
    return start()


def _readiness(client: httpx.Client) -> int | None:
    try:
        return client.get("/readyz").status_code
    except httpx.TransportError:
        return None
