"""Which policies are resident, and which plan is routed by: a pointer that moves only to what is loaded already."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from engine.contracts import CHAMPION, Assignment, PolicyVersion, ProposerKind, ServingPlan, SlipstreamError
from engine.model.loading import Target
from engine.registry.artifacts import ArtifactStore
from engine.routing import assign, without
from engine.server.engine_thread import EngineThread
from engine.speculation.artifact import build_artifact, load_proposer
from engine.speculation.proposer import Proposer

log = logging.getLogger(__name__)
PLAIN = 0
"""The version number of plain decoding before the database has said anything; never in the ledger."""
READERS = 4
"""Policies whose files are read at the same time: one that is slow must not keep another waiting."""
FAILED_RETRY_S = 15.0
"""A policy that could not be loaded is tried again this often."""

Lookup = Callable[[int], PolicyVersion | None]


@dataclass(frozen=True, slots=True)
class Applied:
    """A plan that is routed by now: how long its loading took, seconds, and how many policies had to be loaded.

    ``error`` says what of it could not be loaded; what is served in its place is the rule of ``routing.without``.
    """

    plan: ServingPlan
    load_s: float
    loaded: int
    error: str | None = None


class Residency:
    """Loads what plans name, switches by pointer between two steps, and gives requests their arm.

    ``assign`` is called from the event loop, ``follow`` from the thread that watches the ledger; they share references
    that are replaced whole. Files are read in threads of their own, so that a policy that is slow to load never keeps
    the replica from hearing that it was taken back.
    """

    def __init__(
        self,
        thread: EngineThread,
        target: Target,
        store: ArtifactStore,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._thread, self._target, self._store = thread, target, store
        self.lease_s, self._clock = lease_s, clock
        self._plan: ServingPlan | None = None  # as the ledger has it
        self._served: ServingPlan | None = None  # without what could not be loaded
        self._heard_at = clock()
        self._resident: frozenset[int] = frozenset()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="policies")
        self._reading: dict[int, Future[Proposer]] = {}
        self._failed: dict[int, tuple[str, float]] = {}  # version → why, when it is tried again
        self._wanted: tuple[int, float] = (0, 0.0)  # the newest generation asked for, when it was first

    def start(self) -> None:
        """Make plain decoding resident, before anything else is asked for."""
        files = build_artifact(ProposerKind.NONE, 0)
        plain = load_proposer(files, self._store.put(files), None)
        self._thread.call(lambda: self._thread.engine.load(PLAIN, plain))
        self._resident = frozenset({PLAIN})

    def stop(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)

    @property
    def plan(self) -> ServingPlan | None:
        """The newest plan in force, as the ledger has it."""
        return self._plan

    @property
    def resident(self) -> tuple[int, ...]:
        return tuple(sorted(self._resident - {PLAIN}))

    @property
    def is_reading(self) -> bool:
        """Whether a policy is being read that a plan waits for."""
        return bool(self._reading)

    @property
    def error(self) -> str | None:
        """What of the plan in force could not be loaded."""
        named = self._plan.versions if self._plan is not None else frozenset()
        failed = [f"v{version}: {why}" for version, (why, _) in sorted(self._failed.items()) if version in named]
        return "; ".join(failed) or None

    def heard(self) -> None:
        """The ledger has answered: whatever is served now is what it says."""
        self._heard_at = self._clock()

    @property
    def lease_expired(self) -> bool:
        return self._clock() - self._heard_at > self.lease_s

    def assign(self, key: str, traffic_class: str) -> Assignment:
        """The arm of a request, by the plan of this moment; plain decoding while there is none."""
        plan = self._served
        if plan is None:
            return Assignment(CHAMPION, PLAIN, 0)
        return assign(plan, key, traffic_class, self.lease_expired)

    def follow(self, plan: ServingPlan, lookup: Lookup) -> Applied | None:
        """Come closer to ``plan``; never waits for files. To be called again until it is in force.

        None while something that it names is still being read, when it is not newer than what is in force, or when
        nothing has changed. A rollback names only what is resident, so it is in force at once. Each version is loaded
        by itself: one that cannot be takes nothing away but itself, and is tried again.
        """
        if self._plan is not None and plan.generation < self._plan.generation:
            return None
        if plan.generation > self._wanted[0]:
            self._wanted = (plan.generation, self._clock())
        self._read(plan, lookup)
        if any(not self._reading[version].done() for version in plan.versions & self._reading.keys()):
            return None
        fresh = self._collect(plan)
        if self._plan is not None and plan.generation == self._plan.generation and not fresh:
            return None
        before, served = self._plan, without(plan, frozenset(self._failed), PLAIN)

        def switch() -> None:
            for version, proposer in fresh.items():
                if version not in self._thread.engine.resident:  # loaded by a call that was given up on
                    self._thread.engine.load(version, proposer)
            self._plan, self._served = plan, served

        self._thread.call(switch)
        self._resident |= fresh.keys()
        # What the plan before named stays: a request that was given its arm a moment ago may still be on its way.
        self._keep({PLAIN} | plan.versions | (before.versions if before is not None else frozenset()))
        return Applied(plan, self._clock() - self._wanted[1], len(fresh), self.error)

    def _read(self, plan: ServingPlan, lookup: Lookup) -> None:
        """Begin to read what is missing, unless it failed a moment ago, and forget what nobody asks for any more."""
        for version in [v for v, reading in self._reading.items() if v not in plan.versions and reading.done()]:
            del self._reading[version]
        for version in plan.versions - self._resident - self._reading.keys():
            if version not in self._failed or self._clock() >= self._failed[version][1]:
                self._reading[version] = self._readers.submit(self._proposer, version, lookup(version))

    def _collect(self, plan: ServingPlan) -> dict[int, Proposer]:
        """What has been read for ``plan`` since; failures are remembered."""
        fresh, failed = dict[int, Proposer](), dict(self._failed)
        for version in sorted(plan.versions & self._reading.keys()):
            try:
                fresh[version] = self._reading.pop(version).result()
            except Exception as error:
                why = str(error) if isinstance(error, SlipstreamError) else f"{type(error).__name__}: {error}"
                log.error("policy version %d cannot be loaded: %s", version, why)
                failed[version] = (why, self._clock() + FAILED_RETRY_S)
            else:
                failed.pop(version, None)
        self._failed = failed  # replaced whole: readiness reads it from another thread
        return fresh

    def _proposer(self, version: int, found: PolicyVersion | None) -> Proposer:
        if found is None:
            raise SlipstreamError(f"The plan names policy version {version}, which is not in policy_versions.")
        target = self._target
        return load_proposer(
            self._store.path(found.digest), found.digest, target.fingerprint, target.tokenizer_fingerprint
        )

    def _keep(self, wanted: set[int] | frozenset[int]) -> None:
        self._failed = {version: why for version, why in self._failed.items() if version in wanted}
        gone = self._resident - wanted

        def unload() -> None:
            for version in gone:
                self._thread.engine.unload(version)

        if gone:
            self._thread.call(unload)
            self._resident -= gone
