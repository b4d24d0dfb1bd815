"""Follow the ledger: LISTEN for speed, a poll for certainty; say what is observed, and that we live."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import psycopg
from sqlalchemy.exc import SQLAlchemyError

from engine.contracts import PolicyVersion, ProposerKind, ReplicaState, ServingPlan, SlipstreamError
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import ensure_version
from engine.server.residency import Residency
from engine.settings import EngineSettings
from engine.speculation.artifact import build_artifact
from engine.store.database import KEEPALIVE, Database, libpq_url
from engine.store.repositories import plans, policies, replicas

log = logging.getLogger(__name__)
DEFAULT_K = 4
RETRY_S = 1.0
FAILED_RETRY_S = 15.0
"""A plan whose policy could not be loaded is tried again this often."""


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
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database, self._residency, self._store, self._settings = database, residency, store, settings
        self._describe, self._clock, self._now = describe, clock, now
        self._started_at = now()
        self._failed: tuple[int, float] | None = None  # generation that did not load, when to try again
        self._unsaid: list[tuple[int, datetime, float, str | None]] = []  # observations the database has not heard
        self._beat_at = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="plans", daemon=True)
        self.error: str | None = "nothing heard of the ledger yet"
        self.load_error: str | None = None  # why the newest plan is not in force, though it was read

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

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
            except (psycopg.Error, SQLAlchemyError) as error:
                self._say(str(error).splitlines()[0])
                self._stop.wait(RETRY_S)
            except Exception as error:
                # This thread is how a replica hears of a rollback: whatever went wrong, it must not end.
                log.exception("following the ledger failed, trying again")
                self._say(f"{type(error).__name__}: {error}")
                self._stop.wait(RETRY_S)

    def _follow(self, connection: psycopg.Connection[Any]) -> None:
        while not self._stop.is_set():
            self.look()
            for _ in connection.notifies(timeout=self._settings.plan_poll_s, stop_after=1):
                pass  # what it says is in the table

    def look(self) -> None:
        """Read the ledger once, follow it if it has moved, and report."""
        with self._database.read() as session:
            plan = plans.latest(session)
        self._residency.heard()
        self._say(None)
        if plan is None:
            self._first_plan()
            return
        current = self._residency.plan
        if (current is None or plan.generation > current.generation) and not self._is_backing_off(plan):
            self._apply(plan)
        self._report()

    def _apply(self, plan: ServingPlan) -> None:
        try:
            applied = self._residency.apply(plan, self._lookup)
        except SlipstreamError as error:
            log.error("generation %d cannot be served, the one before stays: %s", plan.generation, error)
            self._failed = (plan.generation, self._clock() + FAILED_RETRY_S)
            self.load_error = f"generation {plan.generation} cannot be loaded: {error}"
            self._unsaid.append((plan.generation, self._now(), 0.0, str(error)))
            return
        if applied is not None:
            self._failed = self.load_error = None
            self._unsaid.append((plan.generation, self._now(), applied.load_s, None))
            self._beat_at = 0.0  # say so at once
            log.info("generation %d: champion v%d, %d loaded", plan.generation, plan.champion, applied.loaded)

    def _is_backing_off(self, plan: ServingPlan) -> bool:
        return self._failed is not None and self._failed[0] == plan.generation and self._clock() < self._failed[1]

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
        plan = self._residency.plan
        state = ReplicaState(
            replica_id=self._settings.replica_id,
            address=address,
            model=model,
            started_at=self._started_at,
            heartbeat_at=self._now(),
            observed_generation=plan.generation if plan is not None else None,
            resident=self._residency.resident,
            stats=stats,
        )
        with self._database.write() as session:
            for generation, at, load_s, error in self._unsaid:
                plans.observe(session, self._settings.replica_id, generation, at, load_s, error)
            replicas.beat(session, state)
        self._unsaid.clear()
        self._beat_at = self._clock()

    def _say(self, error: str | None) -> None:
        if error is not None and self.error != error:
            log.warning("the ledger cannot be read; the last plan stays in force: %s", error)
        self.error = error
