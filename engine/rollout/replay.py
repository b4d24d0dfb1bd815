"""Replaying the record: each decision, made again from its own evidence, comes out the same and leads to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.rollout.decide import decide
from engine.rollout.loading import frozen
from engine.rollout.records import Action, RolloutStatus, evidence_from_json, status_from_json, with_plan
from engine.store.repositories.rollouts import DecisionRecord, Rollout


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A stored decision, and what the same evidence, or the decision before it, gives today."""

    decision_id: int | None
    stored: tuple[str, ...]
    replayed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Replayed:
    """``judged`` decisions were made of evidence; that of the ``unreadable`` ones this version of the code cannot read:
    nothing is said of them."""

    judged: int
    differing: tuple[Disagreement, ...]
    unreadable: tuple[int | None, ...]

    @property
    def same(self) -> int:
        """How many come out as recorded."""
        return self.judged - len({one.decision_id for one in self.differing}) - len(self.unreadable)

    @property
    def agrees(self) -> bool:
        return not self.differing and not self.unreadable


def replay(rollout: Rollout, decisions: Sequence[DecisionRecord]) -> Replayed:
    """Make ``decisions`` again, oldest first: verdict, state, action, and weights that the next one started from.

    Untrusted where the specification is not the one that was frozen. What a person moved was decided by nobody, nor was
    the end of a rollout that could not be read: such rows have no evidence.
    """
    spec = frozen(rollout)
    differing, unreadable = list[Disagreement](), list[int | None]()
    judged = sum("inputs" in record.evidence for record in decisions)
    after: RolloutStatus | None = None
    for record in decisions:
        if "inputs" not in record.evidence:
            after = None
            continue
        try:
            evidence, commands = evidence_from_json(record.evidence)
            before = status_from_json(record.status_before)
        except (KeyError, TypeError, ValueError):  # written by another version of the code
            unreadable.append(record.id)
            after = None
            continue
        if after is not None and _standing(before) != _standing(after):
            differing.append(Disagreement(record.id, _standing(before), _standing(after)))
        again = decide(spec, before, evidence, commands, record.decided_at)
        stored = (record.verdict.value, record.to_state.value, record.action)
        replayed = (again.verdict.value, again.to_state.value, again.action.value)
        if stored != replayed:
            differing.append(Disagreement(record.id, stored, replayed))
        after = again.status
        if again.action is not Action.NONE and record.generation is not None:
            after = with_plan(again, record.generation, record.decided_at)
    return Replayed(judged, tuple(differing), tuple(unreadable))


def _standing(status: RolloutStatus) -> tuple[str, ...]:
    """What one decision leaves and the next one starts from; plans are dated by the database's clock, not compared."""
    stages = [*status.stages, *([status.watch] if status.watch is not None else [])]
    return (
        status.state.value,
        f"v{status.canary} against v{status.champion}",
        f"generation {status.generation}",
        *(f"{stage.weight:g} in generation {stage.generation}" for stage in stages),
    )
