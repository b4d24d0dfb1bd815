"""Which policies are resident, and which plan is routed by: a pointer that moves only to what is loaded already."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from engine.contracts import CANARY, CHAMPION, Assignment, PolicyVersion, ProposerKind, ServingPlan, SlipstreamError
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
READ_PATIENCE_S = 30.0
"""A policy that takes longer to read counts as one that cannot be loaded, until it comes."""
FAILED_RETRY_S = 15.0
"""A policy that could not be loaded is tried again this often."""

Lookup = Callable[[int], PolicyVersion | None]


@dataclass(frozen=True, slots=True)
class Applied:
    """A plan that is routed by since ``at`` (monotonic seconds): how long its loading took, seconds, and how many
    policies had to be loaded.

    ``error`` says what of it could not be loaded; what is served in its place is the rule of ``routing.without``.
    """

    plan: ServingPlan
    at: float
    load_s: float
    loaded: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Reading:
    future: Future[Proposer]
    began: float


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
        self._reading: dict[int, _Reading] = {}
        self._failed: dict[int, tuple[str, float]] = {}  # version → why, when it is tried again
        self._wanted: tuple[int, float] = (0, 0.0)  # the newest generation asked for, when it was first
        self._news: Applied | None = None  # what follow has yet to say
        self._tried: tuple[int, float] | None = None
        self.is_reading = False  # whether the newest plan waits for a policy that is being read

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
    def served(self) -> ServingPlan | None:
        """The plan in force without what could not be loaded, or has been taken back."""
        return self._served

    @property
    def resident(self) -> tuple[int, ...]:
        return tuple(sorted(self._resident - {PLAIN}))

    @property
    def is_alive(self) -> bool:
        """Whether there is an engine to serve with."""
        return self._thread.is_alive

    @property
    def error(self) -> str | None:
        """What of the plan in force could not be loaded."""
        named = self._plan.versions if self._plan is not None else frozenset()
        failed = [f"v{version}: {why}" for version, (why, _) in sorted(self._failed.items()) if version in named]
        return "; ".join(failed) or None

    def heard(self) -> None:
        """The ledger has been followed: nothing is served that it has taken back."""
        self._heard_at = self._clock()

    @property
    def lease_expired(self) -> bool:
        return self._clock() - self._heard_at > self.lease_s

    @property
    def tried(self) -> tuple[int, float] | None:
        """The last request that was given to a canary: under which generation, and when (monotonic seconds)."""
        return self._tried

    def assign(
        self, key: str, traffic_class: str, tenant: str | None = None, slice_name: str | None = None
    ) -> Assignment:
        """The arm of a request, by the plan of this moment; plain decoding while there is none."""
        plan = self._served
        if plan is None:
            return Assignment(CHAMPION, PLAIN, 0)
        made = assign(plan, key, traffic_class, self.lease_expired, tenant, slice_name)
        if made.arm == CANARY:
            self._tried = (made.generation, self._clock())
        return made

    def follow(self, plan: ServingPlan, lookup: Lookup) -> Applied | None:
        """Come closer to ``plan``; never waits for files. To be called again until it is in force.

        None while something that it names is still being read, when it is older than what is in force, or when nothing
        has changed. A rollback names only what is resident, so it is in force at once; and an arm that ``plan`` takes
        back stops at once, whatever else has to be read. Each version is loaded by itself: one that cannot be takes
        nothing away but itself, and is tried again.
        """
        if self._plan is None or plan.generation >= self._plan.generation:
            self._advance(plan, lookup)
        news, self._news = self._news, None
        return news

    def _advance(self, plan: ServingPlan, lookup: Lookup) -> None:
        if plan.generation > self._wanted[0]:
            self._wanted = (plan.generation, self._clock())
        self._read(plan, lookup)
        patience = self._clock() - READ_PATIENCE_S
        readings = [self._reading[version] for version in plan.versions & self._reading.keys()]
        self.is_reading = any(reading.began > patience and not reading.future.done() for reading in readings)
        if self.is_reading:
            self._withdraw(plan)
            return
        fresh = self._load(self._collect(plan))
        before = self._plan
        if before is not None and plan.generation == before.generation and not fresh:
            return
        self._plan, self._served = plan, without(plan, frozenset(self._failed), PLAIN)
        now = self._clock()
        self._news = Applied(plan, now, now - self._wanted[1], len(fresh), self.error)
        # What the plan before named stays: a request that was given its arm a moment ago may still be on its way.
        self._keep({PLAIN} | plan.versions | (before.versions if before is not None else frozenset()))

    def _withdraw(self, plan: ServingPlan) -> None:
        served = self._served
        if served is not None and _tried(served) != _tried(plan):
            self._served = replace(served, arms=())

    def _read(self, plan: ServingPlan, lookup: Lookup) -> None:
        """Begin to read what is missing, unless it failed a moment ago, and forget what nobody asks for any more."""
        for version in [v for v, reading in self._reading.items() if v not in plan.versions and reading.future.done()]:
            del self._reading[version]
        for version in plan.versions - self._resident - self._reading.keys():
            if version not in self._failed or self._clock() >= self._failed[version][1]:
                future = self._readers.submit(self._proposer, version, lookup(version))
                self._reading[version] = _Reading(future, self._clock())

    def _collect(self, plan: ServingPlan) -> dict[int, Proposer]:
        """What has been read for ``plan``; what was not in time counts as failed until it comes."""
        fresh = {}
        for version in sorted(plan.versions & self._reading.keys()):
            future = self._reading[version].future
            if not future.done():
                if version not in self._failed:  # once: it is looked for at every poll
                    self._fail(version, SlipstreamError(f"it is still being read after {READ_PATIENCE_S:.0f} s"))
                continue
            del self._reading[version]
            try:
                fresh[version] = future.result()
            except Exception as error:
                self._fail(version, error)
        return fresh

    def _load(self, fresh: Mapping[int, Proposer]) -> frozenset[int]:
        """Give proposers to the engine between two steps; which of them it took."""
        if not fresh:
            return frozenset()

        def load() -> dict[int, Exception]:
            refused = dict[int, Exception]()
            for version, proposer in fresh.items():
                try:
                    if version not in self._thread.engine.resident:  # loaded by a call that was given up on
                        self._thread.engine.load(version, proposer)
                except Exception as error:
                    refused[version] = error
            self._resident = self._resident.union(fresh.keys() - refused.keys())
            return refused

        refused = self._thread.call(load)
        for version, error in refused.items():
            self._fail(version, error)
        taken = frozenset(fresh.keys() - refused.keys())
        self._failed = {version: why for version, why in self._failed.items() if version not in taken}
        return taken

    def _fail(self, version: int, error: Exception) -> None:
        why = str(error) if isinstance(error, SlipstreamError) else f"{type(error).__name__}: {error}"
        log.error("policy version %d cannot be loaded: %s", version, why)
        # Replaced whole: readiness reads it from another thread.
        self._failed = self._failed | {version: (why, self._clock() + FAILED_RETRY_S)}

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
            self._resident -= gone

        if gone:
            self._thread.call(unload)


def _tried(plan: ServingPlan) -> set[tuple[str, int]]:
    return {(arm.name, arm.policy_version) for arm in plan.arms}
