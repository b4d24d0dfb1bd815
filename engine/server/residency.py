"""Which policies are resident, and which plan is routed by: a pointer that moves only to what is loaded already."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine.contracts import CHAMPION, Assignment, PolicyVersion, ProposerKind, ServingPlan, SlipstreamError
from engine.model.loading import Target
from engine.registry.artifacts import ArtifactStore
from engine.routing import assign
from engine.server.engine_thread import EngineThread
from engine.speculation.artifact import build_artifact, load_proposer
from engine.speculation.proposer import Proposer

log = logging.getLogger(__name__)
PLAIN = 0
"""The version number of plain decoding before the database has said anything; never in the ledger."""


@dataclass(frozen=True, slots=True)
class Applied:
    """A plan that is routed by now: how long its loading took, seconds, and how many policies had to be loaded."""

    plan: ServingPlan
    load_s: float
    loaded: int


class Residency:
    """Loads what plans name, switches by pointer between two steps, and gives requests their arm.

    ``assign`` is called from the event loop, ``apply`` from the thread that watches the ledger; they share references
    that are replaced whole.
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
        self._lease_s, self._clock = lease_s, clock
        self._plan: ServingPlan | None = None
        self._heard_at = clock()
        self._resident: frozenset[int] = frozenset()

    def start(self) -> None:
        """Make plain decoding resident, before anything else is asked for."""
        files = build_artifact(ProposerKind.NONE, 0)
        self._load({PLAIN: load_proposer(files, self._store.put(files), None)})

    @property
    def plan(self) -> ServingPlan | None:
        return self._plan

    @property
    def resident(self) -> tuple[int, ...]:
        return tuple(sorted(self._resident - {PLAIN}))

    def heard(self) -> None:
        """The ledger has answered: whatever is served now is what it says."""
        self._heard_at = self._clock()

    @property
    def lease_expired(self) -> bool:
        return self._clock() - self._heard_at > self._lease_s

    def assign(self, key: str, traffic_class: str) -> Assignment:
        """The arm of a request, by the plan of this moment; plain decoding while there is none."""
        plan = self._plan
        if plan is None:
            return Assignment(CHAMPION, PLAIN, 0)
        return assign(plan, key, traffic_class, self.lease_expired)

    def apply(self, plan: ServingPlan, lookup: Callable[[int], PolicyVersion | None]) -> Applied | None:
        """Route by ``plan`` from the next step on; None when it is not newer than the one in force.

        Whatever it names is loaded first; SlipstreamError when that fails, and then nothing has changed. A rollback
        names only what is resident, so it loads nothing.
        """
        if self._plan is not None and plan.generation <= self._plan.generation:
            return None
        began = self._clock()
        missing = sorted(plan.versions - self._resident)
        fresh = {version: self._proposer(version, lookup) for version in missing}
        if fresh:
            self._load(fresh)
        before = self._plan
        self._thread.call(lambda: self._switch(plan))
        # What the plan before named stays: a request that was given its arm a moment ago may still be on its way.
        self._keep({PLAIN} | plan.versions | (before.versions if before is not None else frozenset()))
        return Applied(plan, self._clock() - began, len(missing))

    def _switch(self, plan: ServingPlan) -> None:
        self._plan = plan

    def _proposer(self, version: int, lookup: Callable[[int], PolicyVersion | None]) -> Proposer:
        found = lookup(version)
        if found is None:
            raise SlipstreamError(f"The plan names policy version {version}, which is not in policy_versions.")
        target = self._target
        return load_proposer(
            self._store.path(found.digest), found.digest, target.fingerprint, target.tokenizer_fingerprint
        )

    def _load(self, proposers: Mapping[int, Proposer]) -> None:
        def load() -> None:
            for version, proposer in proposers.items():
                if version not in self._thread.engine.resident:  # loaded by a call that was given up on
                    self._thread.engine.load(version, proposer)

        self._thread.call(load)
        self._resident |= frozenset(proposers)

    def _keep(self, wanted: set[int] | frozenset[int]) -> None:
        gone = self._resident - wanted

        def unload() -> None:
            for version in gone:
                self._thread.engine.unload(version)

        if gone:
            self._thread.call(unload)
            self._resident -= gone
