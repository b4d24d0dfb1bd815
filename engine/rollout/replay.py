"""Replaying the record: every decision, made again from its own evidence, must come out the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.rollout import specs
from engine.rollout.decide import decide
from engine.rollout.records import evidence_from_json, status_from_json
from engine.store.repositories.rollouts import DecisionRecord


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A stored decision, and what the same evidence gives today."""

    decision_id: int | None
    stored: tuple[str, str, str]
    replayed: tuple[str, str, str]


def replay(spec: Mapping[str, Any], decisions: Sequence[DecisionRecord]) -> list[Disagreement]:
    """The decisions that do not come out again as (verdict, to_state, action); none when all is well."""
    parsed = specs.thaw(spec)
    found = []
    for record in decisions:
        if "inputs" not in record.evidence:  # the end of a rollout whose specification could not be read
            continue
        evidence, commands = evidence_from_json(record.evidence)
        again = decide(parsed, status_from_json(record.status_before), evidence, commands, record.decided_at)
        stored = (record.verdict.value, record.to_state.value, record.action)
        replayed = (again.verdict.value, again.to_state.value, again.action.value)
        if stored != replayed:
            found.append(Disagreement(record.id, stored, replayed))
    return found
