"""A system to measure: its own data directory, real Postgres, real engine process, real HTTP."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from engine.contracts import ServingPlan, SlipstreamError
from engine.ops import postgres, system
from engine.ops.supervisor import Component, Say, Supervisor
from engine.settings import Settings
from engine.store.database import Database
from engine.store.repositories import audit, plans

FOLLOWED_S = 30.0
"""A replica follows a plan in well under a second where nothing of it has to be loaded."""


@dataclass(frozen=True, slots=True)
class Rig:
    settings: Settings
    supervisor: Supervisor
    database: Database

    @property
    def url(self) -> str:
        return f"http://{self.settings.engine.host}:{self.settings.engine.port}"

    def stored(self) -> int:
        """Traces in the table."""
        with self.database.read() as session:
            return audit.traces(session)

    def followed(self, plan: ServingPlan, timeout_s: float = FOLLOWED_S) -> datetime:
        """Wait until a replica routes by ``plan``, all of it; the moment since when. SlipstreamError if none does."""
        seen = list[datetime]()

        def observed() -> bool:
            with self.database.read() as session:
                seen[:] = [o.observed_at for o in plans.observations(session, plan.generation) if o.error is None]
            return bool(seen)

        wait_until(observed, f"generation {plan.generation} to be followed", timeout_s)
        return max(seen)


@contextmanager
def rig(
    settings: Settings,
    say: Say,
    engine: Callable[[Settings], Component] = system.engine_component,
    keep: Path | None = None,
) -> Iterator[Rig]:
    """Postgres and an engine in a data directory of their own (``own_home``); the model of the usual one is used."""
    from engine.model.weights import resolve_model  # brings torch, which the benchmarks of the store alone do without

    model = resolve_model(settings.engine.model, settings.dir("models"), say)
    with own_home(keep) as home:
        own = settings.model_copy(
            update={
                "home": home,
                "database_url": None,
                "engine": settings.engine.model_copy(update={"model": str(model)}),
            }
        )
        own = system.free_ports(own)
        supervisor = Supervisor(home, say, yielding=own.yielding)
        try:
            say("starting Postgres and an engine")
            own = own.model_copy(update={"database_url": system.start_database(own)})
            supervisor.start(engine(own))
            supervisor.wait_ready("engine", system.READY_S["engine"])
            database = Database(own.database_url or "", application="slipstream bench")
            yield Rig(own, supervisor, database)
            database.close()
        finally:
            supervisor.stop()


@contextmanager
def own_home(keep: Path | None = None) -> Iterator[Path]:
    """A temporary data directory, or the folder ``keep``, which stays. The Postgres that is started in it ends with it,
    whatever ends the run."""
    with ExitStack() as stack:
        if keep is None:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slipstream-bench-")))
        else:
            home = keep.resolve()
            home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o755)  # the embedded server runs as another user when we are root
        try:
            yield home
        finally:
            postgres.stop(home)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float, pause_s: float = 0.01) -> None:
    """Wait for a condition; SlipstreamError naming it when it does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SlipstreamError(f"Waited {timeout_s:.0f} s in vain for: {what}")
        time.sleep(pause_s)
