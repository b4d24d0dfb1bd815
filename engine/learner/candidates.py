"""What makes a candidate of the buffered traces: one interface, a maker for every kind of policy that is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from engine.contracts import PolicyVersion
from engine.learner.gate import Replayer
from engine.learner.memory import MemoryLearner, build_memory
from engine.learner.traces import ServedTarget
from engine.registry.artifacts import ArtifactStore
from engine.settings import Settings
from engine.store.database import Database
from engine.store.repositories.intake import TrainableTrace


class CandidateMaker(Protocol):
    """May keep what it has computed, to compute less the next time; what it makes does not depend on that."""

    def make(
        self,
        train: Sequence[TrainableTrace],
        target: ServedTarget,
        champion: PolicyVersion | None,
        alive: Callable[[], None] = lambda: None,
    ) -> dict[str, bytes]:
        """The files of a policy learned from ``train``. ``alive`` is called between parts of what takes long."""

    @property
    def replayer(self) -> Replayer | None:
        """How the gate lets policies draft, None where the tokens are enough. Valid after ``make``."""


class MemoryMaker:
    """A trace memory and nothing else: needs no model."""

    replayer: Replayer | None = None

    def __init__(self, settings: Settings) -> None:
        self._settings, self._learner = settings.learner, MemoryLearner()

    def make(
        self,
        train: Sequence[TrainableTrace],
        target: ServedTarget,
        champion: PolicyVersion | None,
        alive: Callable[[], None] = lambda: None,
    ) -> dict[str, bytes]:
        parent = champion.digest if champion is not None else None
        return build_memory(train, target, self._settings, parent, self._learner, alive)


def maker(settings: Settings, db: Database, store: ArtifactStore) -> CandidateMaker:
    """The maker that ``learner.kind`` names."""
    if settings.learner.kind == "hybrid":
        from engine.learner.neural import HybridMaker  # torch takes a second and 200 MB

        return HybridMaker(settings, db, store)
    return MemoryMaker(settings)
