"""Follow the ledger: LISTEN for speed, a poll for certainty; say what is observed, and that we live."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import psycopg
from sqlalchemy.exc import SQLAlchemyError

from engine.contracts import PolicyVersion, ProposerKind, ReplicaState
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import ensure_version
from engine.server.residency import Applied, Residency
from engine.settings import EngineSettings
from engine.speculation.artifact import build_artifact
from engine.store.connection import KEEPALIVE, libpq_url
from engine.store.database import Database, server_clock
from engine.store.repositories import plans, policies, replicas

log = logging.getLogger(__name__)
DEFAULT_K = 4
RETRY_S = 1.0
READING_POLL_S = 0.02
"""How often it is seen whether what a plan waits for has been read."""


class PlanSubscriber:
    """One thread. ``describe`` gives the part of the heartbeat that only the server knows."""

    def __init__(
        self,
        database: Database,
        residency: Residency,
        store: ArtifactStore,
        settings: EngineSettings,
        describe: Callable[[], tuple[str, str, dict[str, Any]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database, self._residency, self._store, self._settings = database, residency, store, settings
        self._describe, self._clock = describe, clock
        self._started_at: datetime | None = None  # by the database's clock, like all that others compare
        self._after_crash = False  # whether one of this name ended without saying so
        self._unsaid: list[Applied] = []  # what the database has not heard
        self._beat_at = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="plans", daemon=True)
        self.error: str | None = "nothing heard of the ledger yet"

    def start(self) -> None:
        self._thread.start()

    def halt(self) -> None:
        """Begin to stop; does not wait."""
        self._stop.set()

    def stop(self) -> None:
        """End the thread and say goodbye, so that nobody waits for this replica's lease."""
        self.halt()
        self._thread.join()
        self._residency.stop()
        if self._started_at is None:
            return
        try:
            with self._database.write() as session:
                replicas.leave(session, self._settings.replica_id, self._started_at)
        except SQLAlchemyError as error:
            log.warning("the database did not hear that this replica stops: %s", str(error).splitlines()[0])

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with psycopg.connect(
                    libpq_url(self._database.url),
                    autocommit=True,
                    connect_timeout=5,
                    application_name="slipstream plans",
                    **KEEPALIVE,
                ) as connection:
                    connection.execute(f"LISTEN {plans.CHANNEL}")
                    self._follow(connection)
            except psycopg.Error as error:
                # Without notifications the poll goes on: a server may be out of connections, or forbid LISTEN.
                log.warning("no notifications of new plans, polling: %s", str(error).splitlines()[0])
                self._look_guarded()
                self._stop.wait(RETRY_S)

    def _look_guarded(self) -> bool:
        """This thread is how a replica hears of a rollback: whatever goes wrong, it must not end."""
        try:
            self.look()
        except SQLAlchemyError as error:
            self._say(str(error).splitlines()[0])
        except replicas.NameTaken as error:
            self._started_at = None  # it may be free again later
            self._say(str(error))
        except Exception as error:
            log.exception("following the ledger failed, trying again")
            self._say(f"{type(error).__name__}: {error}")
        else:
            return True
        return False

    def _follow(self, connection: psycopg.Connection[Any]) -> None:
        while not self._stop.is_set():
            if not self._look_guarded():
                self._stop.wait(RETRY_S)
            wait = READING_POLL_S if self._residency.is_reading else self._settings.plan_poll_s
            for _ in connection.notifies(timeout=wait, stop_after=1):
                pass  # what it says is in the table

    def look(self) -> None:
        """Read the ledger once, follow it if it has moved, and report."""
        if self._started_at is None:
            self._enter()
        with self._database.read() as session:
            plan = plans.latest(session)
        if plan is None:
            self._first_plan()
            return
        if not self._residency.is_alive:
            self._say("the engine's thread has ended")
            return  # and no heartbeat: what serves nothing must not be waited for
        applied = self._residency.follow(plan, self._lookup)
        self._residency.heard()
        self._say(None)
        if applied is not None:
            self._unsaid.append(applied)
            log.info("generation %d: champion v%d, %d loaded", plan.generation, plan.champion, applied.loaded)
        self._report()

    def _enter(self) -> None:
        """Before any plan is followed: nobody may take this replica's word for another's."""
        with self._database.write() as session:
            now = server_clock(session)
            self._after_crash = replicas.enter(session, self._settings.replica_id, now)
        self._started_at = now

    def _lookup(self, version: int) -> PolicyVersion | None:
        with self._database.read() as session:
            return policies.get(session, version)

    def _first_plan(self) -> None:
        """An empty ledger: plain decoding as the fallback, prompt lookup as the first champion."""
        none = ensure_version(self._database, self._store, build_artifact(ProposerKind.NONE, 0))
        ngram = ensure_version(self._database, self._store, build_artifact(ProposerKind.NGRAM, DEFAULT_K))
        with self._database.write() as session:
            try:
                plans.append(
                    session,
                    champion=ngram.version,
                    fallback=none.version,
                    actor="engine",
                    reason="first start",
                    expected_generation=0,
                )
            except plans.StalePlan:
                log.info("another replica wrote the first plan")

    def _report(self) -> None:
        """Write what was observed and, once a poll interval, the heartbeat."""
        if not self._unsaid and self._clock() - self._beat_at < self._settings.plan_poll_s * 0.9:
            return
        address, model, stats = self._describe()
        plan, started_at = self._residency.plan, self._started_at
        assert started_at is not None
        with self._database.write() as session:
            now, ticks = server_clock(session), self._clock()
            for applied in self._unsaid:
                observed_at = now - timedelta(seconds=ticks - applied.at)
                plans.observe(
                    session,
                    self._settings.replica_id,
                    applied.plan.generation,
                    observed_at,
                    applied.load_s,
                    applied.error,
                )
            state = ReplicaState(
                replica_id=self._settings.replica_id,
                address=address,
                model=model,
                started_at=started_at,
                heartbeat_at=now,
                observed_generation=plan.generation if plan is not None else None,
                resident=self._residency.resident,
                stats=stats | {"after_crash": self._after_crash, "canary_given": self._given(now, ticks)},
                lease_s=self._residency.lease_s,
            )
            replicas.beat(session, state)
        self._unsaid.clear()
        self._beat_at = self._clock()

    def _given(self, now: datetime, ticks: float) -> dict[str, Any] | None:
        """When a canary was given its last request, by the database's clock: its traces must be seen to follow."""
        if (tried := self._residency.tried) is None:
            return None
        generation, at = tried
        return {"generation": generation, "at": (now - timedelta(seconds=ticks - at)).isoformat()}

    def _say(self, error: str | None) -> None:
        if error is not None and self.error != error:
            log.warning("the ledger cannot be read; the last plan stays in force: %s", error)
        self.error = error
