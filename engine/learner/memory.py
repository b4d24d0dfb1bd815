"""The first learner: a trace memory of the buffered traces, counted block by block and weighted by age.

The traces of a class are counted in blocks of 64 by their position. Only a block whose traces changed is counted again,
and only a class with such a block is added up again. A sighting counts ``UNIT`` while it is fresh, half as much after
every ``half_life`` later traces of its own class, and never less than 1: a class that pauses forgets nothing. All of it
is in whole numbers, so the same traces give the same bytes, however they came in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC
from importlib.metadata import version
from typing import Any

from engine.contracts import ProposerKind, SlipstreamError
from engine.learner import traces
from engine.learner.traces import ServedTarget
from engine.settings import LearnerSettings
from engine.speculation.artifact import build_artifact
from engine.speculation.memory import MEMORY_FILE, MIN_CONFIDENCE
from engine.speculation.memory_build import MAX_ORDER, MIN_ORDER, POOLED, PairCounts, add_up, count_pairs, write_memory
from engine.store.repositories.intake import TrainableTrace

UNIT = 16
BLOCK = 64


@dataclass(frozen=True, slots=True)
class MemoryRecipe:
    """All that a memory depends on beside its traces; kept in its manifest, so that it can be made again."""

    max_bytes: int
    half_life: int
    min_n: int = MIN_ORDER
    max_n: int = MAX_ORDER
    unit: int = UNIT
    block: int = BLOCK

    @classmethod
    def of(cls, settings: LearnerSettings) -> MemoryRecipe:
        return cls(settings.memory_max_bytes, settings.memory_half_life)

    def weight(self, age: int) -> int:
        """What one sighting counts ``age`` blocks back."""
        return max(1, round(self.unit * 0.5 ** (age * self.block / self.half_life)))


class MemoryLearner:
    """Keeps what it has counted, to count less the next time; what it makes does not depend on that."""

    def __init__(self) -> None:
        self._recipe: MemoryRecipe | None = None
        self._blocks: dict[tuple[str, int], tuple[tuple[int, ...], PairCounts]] = {}
        self._classes: dict[str, tuple[tuple[object, ...], PairCounts]] = {}

    def learn(
        self, train: Sequence[TrainableTrace], recipe: MemoryRecipe, alive: Callable[[], None] = lambda: None
    ) -> bytes:
        """The memory file of these traces. ``alive`` is called between parts of what takes long."""
        if recipe != self._recipe:
            self._recipe, self._blocks, self._classes = recipe, {}, {}
        members: dict[tuple[str, int], list[TrainableTrace]] = {}
        for trace in train:
            members.setdefault((trace.traffic_class, trace.position // recipe.block), []).append(trace)
        self._blocks = {place: self._block(place, found, recipe, alive) for place, found in members.items()}
        self._classes = {name: self._class(name, recipe, alive) for name in sorted({name for name, _ in members})}
        tables = {name: pairs for name, (_, pairs) in self._classes.items()}
        pooled = add_up([(pairs, 1) for pairs in tables.values()])
        alive()
        return write_memory({**tables, POOLED: pooled}, recipe.max_bytes)

    def _block(
        self, place: tuple[str, int], found: list[TrainableTrace], recipe: MemoryRecipe, alive: Callable[[], None]
    ) -> tuple[tuple[int, ...], PairCounts]:
        alive()
        ordinals = tuple(sorted(trace.ordinal for trace in found))
        known = self._blocks.get(place)
        if known is not None and known[0] == ordinals:
            return known
        responses = ((trace.prompt_ids, trace.output_ids) for trace in found)
        return ordinals, count_pairs(responses, recipe.min_n, recipe.max_n)

    def _class(
        self, name: str, recipe: MemoryRecipe, alive: Callable[[], None]
    ) -> tuple[tuple[object, ...], PairCounts]:
        alive()
        blocks = {block: counted for (of, block), counted in self._blocks.items() if of == name}
        newest = max(blocks)
        parts = [(counted[1], recipe.weight(newest - block)) for block, counted in blocks.items()]
        state = (recipe, *sorted((block, ordinals) for block, (ordinals, _) in blocks.items()))
        known = self._classes.get(name)
        return known if known is not None and known[0] == state else (state, add_up(parts))


def build_memory(
    train: Sequence[TrainableTrace],
    target: ServedTarget,
    settings: LearnerSettings,
    parent: str | None = None,
    learner: MemoryLearner | None = None,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, bytes]:
    """The files of a trace-memory policy. The same traces give the same bytes, whenever and wherever.

    Which traces they are goes to ``policy_lineage``; the manifest keeps their digest, so that the two can be compared.
    """
    if not train:
        raise SlipstreamError("There is no trace to learn from: no trainable request with its tokens in the window.")
    recipe = MemoryRecipe.of(settings)
    return build_artifact(
        ProposerKind.TRACE_MEMORY,
        settings.num_speculative_tokens,
        settings=memory_settings(recipe),
        files={MEMORY_FILE: (learner or MemoryLearner()).learn(train, recipe, alive)},
        target_fingerprint=target.fingerprint,
        tokenizer_fingerprint=target.tokenizer_fingerprint,
        parent=parent,
        lineage=memory_lineage(train, recipe),
    )


def memory_settings(recipe: MemoryRecipe) -> dict[str, Any]:
    """How a policy reads a memory that was counted by this recipe."""
    return {"min_n": recipe.min_n, "max_n": recipe.max_n, "min_confidence": MIN_CONFIDENCE, "unit": recipe.unit}


def memory_lineage(train: Sequence[TrainableTrace], recipe: MemoryRecipe) -> dict[str, Any]:
    """What the manifest says of the traces and how they were counted."""
    used = traces.lineage("train", train)
    return {
        "traces": len(train),
        "trace_ids_sha256": trace_ids_digest(train),
        "window_from": used.window_from.astimezone(UTC).isoformat(),
        "window_to": used.window_to.astimezone(UTC).isoformat(),
        "classes": dict(used.classes),
        "memory": asdict(recipe),
        "code": f"slipstream {version('slipstream')}",
    }


def rebuild_memory(train: Sequence[TrainableTrace], manifest: Mapping[str, Any]) -> bytes:
    """The memory file that a manifest describes, from the traces its lineage names."""
    lineage = manifest["lineage"]
    if (found := trace_ids_digest(train)) != lineage["trace_ids_sha256"]:
        raise SlipstreamError(
            f"The traces are not those that made this version: {len(train)} with digest {found[:12]}…, the manifest "
            f"names {lineage['traces']} with {lineage['trace_ids_sha256'][:12]}…."
        )
    return MemoryLearner().learn(train, MemoryRecipe(**lineage["memory"]))


def trace_ids_digest(train: Sequence[TrainableTrace]) -> str:
    return hashlib.sha256(b"".join(sorted(trace.trace_id.bytes for trace in train))).hexdigest()
