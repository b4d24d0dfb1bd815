"""Trace memory: what the target said after the same few tokens, in past responses of the same traffic class.

Per class one sorted table of n-grams (plain arrays in a safetensors file, 20 bytes an entry): the hash of the last n
tokens, the token that followed most often, how often it did, and how often the n-gram was seen at all; and one table of
all classes together. A request drafts from its own context and from the tables together; the longer match wins, its own
context before its class, its class before all. The draft ends where it is no longer likely that everything up to there
is accepted; how much of it is verified is K control's to decide.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.contracts import ProposerKind
from engine.speculation.acceptance import DEFAULT_CONTROL, ControlSettings
from engine.speculation.memory_build import COLUMNS, MAX_ORDER, MIN_ORDER, POOLED, ngram_hash
from engine.speculation.ngram import ContextIndex, match_confidence
from engine.speculation.proposer import PolicyError, read_settings

__all__ = ["MEMORY_FILE", "TraceMemory", "TraceMemoryProposer", "load"]

MEMORY_FILE = "memory.safetensors"
PRIOR = 6.0
"""Sightings that the shorter match is worth beside those of the longer. Least log loss of the first token on 100 of the
model's own conversations after 80 others (docs/log.md); flat between 4 and 8."""
MOST_KNOWN = 20_000
"""N-grams of which a table's answer is remembered, some 4 MB a class at most."""
MIN_CONFIDENCE = 0.1
"""Drafts are long and unsure: K control, which knows the costs, decides how much of them is verified."""
DEFAULTS: dict[str, int | float] = {"min_n": 2, "max_n": 4, "min_confidence": MIN_CONFIDENCE, "unit": 1}


class ClassMemory:
    """The table of one traffic class. Plain memoryviews: bisect on them is faster than a numpy call per look-up."""

    def __init__(self, key: np.ndarray, token: np.ndarray, count: np.ndarray, total: np.ndarray) -> None:
        self.key, self.token = key.data, token.data
        self.count, self.total = count.data, total.data

    def __len__(self) -> int:
        return len(self.key)

    def find(self, key: int) -> tuple[int, int, int] | None:
        """(most frequent next token, how often it came, how often the n-gram did) after the n-gram with this hash."""
        at = bisect_left(self.key, key)
        if at == len(self.key) or self.key[at] != key:
            return None
        return self.token[at], self.count[at], self.total[at]


class Lookup:
    """The tables that requests of one class ask, the first that knows an n-gram says the token.

    Its confidence rests on the shorter matches too, each of which is the prior of the next longer (interpolation with
    Dirichlet priors, MacKay & Peto 1995): a single sighting says little after one token and much after six that were
    all seen to lead there. ``unit`` is what one fresh sighting counts; old ones count less.

    What was asked lately is remembered: requests of a class ask much the same, and a gate replays each of its own
    again.
    """

    def __init__(self, tables: Sequence[ClassMemory], unit: int) -> None:
        self.tables, self.unit = tables, unit
        self._known: dict[tuple[int, ...], tuple[int, float] | None] = {}

    def next_after(self, tail: tuple[int, ...]) -> tuple[int, float] | None:
        """(token, confidence) after exactly these tokens."""
        if tail in self._known:
            return self._known[tail]
        longest = self._find(tail)
        found = None if longest is None else (longest[0], self._chance(tail, longest[0]))
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known[tail] = found
        return found

    def _find(self, tail: tuple[int, ...]) -> tuple[int, int, int] | None:
        key = ngram_hash(tail)
        for table in self.tables:
            if (found := table.find(key)) is not None:
                return found
        return None

    def _chance(self, tail: tuple[int, ...], token: int) -> float:
        chance, prior = 0.0, PRIOR * self.unit
        for first in range(len(tail) - 1, -1, -1):
            if (found := self._find(tail[first:])) is not None:
                best, count, total = found
                chance = ((count if best == token else 0) + prior * chance) / (total + prior)
        return chance


class TraceMemory:
    """Traffic class → table. Reading is strict; a class that was never seen has an empty memory."""

    def __init__(self, classes: Mapping[str, ClassMemory]) -> None:
        self.classes = dict(classes)
        self._lookups: dict[tuple[str, int], Lookup] = {}

    def lookup(self, traffic_class: str, unit: int) -> Lookup:
        """What requests of a class ask: its own table, then that of all classes together."""
        known = (traffic_class if traffic_class in self.classes else POOLED, unit)  # clients make up names of classes
        if known not in self._lookups:
            names = dict.fromkeys((known[0], POOLED))
            self._lookups[known] = Lookup([self.classes[name] for name in names if name in self.classes], unit)
        return self._lookups[known]

    @classmethod
    def parse(cls, data: bytes) -> TraceMemory:
        from safetensors import SafetensorError
        from safetensors.numpy import load as load_arrays

        try:
            arrays = load_arrays(data)
        except (SafetensorError, KeyError, ValueError) as error:
            raise PolicyError(f"{MEMORY_FILE} is not a safetensors file: {error}") from None
        tables: dict[str, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            traffic_class, slash, column = name.rpartition("/")
            if not slash or column not in COLUMNS:
                raise PolicyError(f"{MEMORY_FILE}: unknown tensor {name!r}.")
            tables.setdefault(traffic_class, {})[column] = array
        return cls({name: _checked(name, columns) for name, columns in tables.items()})


def _checked(traffic_class: str, columns: Mapping[str, np.ndarray]) -> ClassMemory:
    where = f"{MEMORY_FILE}: class {traffic_class!r}"
    if missing := sorted(set(COLUMNS) - set(columns)):
        raise PolicyError(f"{where} lacks {missing}.")
    for name, dtype in COLUMNS.items():
        if columns[name].dtype != dtype or columns[name].shape != columns["key"].shape or columns[name].ndim != 1:
            raise PolicyError(
                f"{where}: {name} is {columns[name].dtype}{columns[name].shape}, not {np.dtype(dtype)}[n]."
            )
    key, count, total = columns["key"], columns["count"], columns["total"]
    if not (key[1:] > key[:-1]).all():
        raise PolicyError(f"{where}: keys are not strictly increasing.")
    if not ((count >= 1) & (count <= total)).all():
        raise PolicyError(f"{where}: counts must lie between 1 and the totals.")
    return ClassMemory(key, columns["token"], count, total)


class TraceMemoryDrafter:
    """``lookup``: where to look after the request's own context."""

    def __init__(self, index: ContextIndex, lookup: Lookup, min_confidence: float) -> None:
        self.index, self.lookup, self.min_confidence = index, lookup, min_confidence
        self.confidence: list[float] = []

    def propose(self, k: int, after: Sequence[int] = (), survival: float = 1.0) -> list[int]:
        """``after``: tokens that somebody else drafted; ``survival``: the probability that all so far are accepted."""
        draft, self.confidence = list[int](), []
        window = [*self.index.tokens[-self.index.max_n :], *after][-self.index.max_n :]  # the end of context + draft
        while len(draft) < k and (found := self._next(window)) is not None:
            token, share = found
            survival *= share
            if survival < self.min_confidence:
                break
            draft.append(token)
            self.confidence.append(share)
            window.append(token)
        return draft

    def _next(self, window: Sequence[int]) -> tuple[int, float] | None:
        """(token, confidence): back off from the longest n-gram until the context or a table knows it."""
        own, token = self.index.longest_match(window)
        for n in range(min(self.index.max_n, len(window)), max(own, self.index.min_n - 1), -1):
            if (found := self.lookup.next_after(tuple(window[-n:]))) is not None:
                return found
        return (token, match_confidence(own, self.index.max_n)) if own else None

    def observe(self, tokens: Sequence[int]) -> None:
        self.index.extend(tokens)


@dataclass(frozen=True, slots=True)
class TraceMemoryProposer:
    num_speculative_tokens: int
    memory: TraceMemory
    min_n: int = 2
    max_n: int = 4
    min_confidence: float = MIN_CONFIDENCE
    control: ControlSettings = DEFAULT_CONTROL
    unit: int = 1
    kind: ProposerKind = ProposerKind.TRACE_MEMORY

    def __post_init__(self) -> None:
        if not MIN_ORDER <= self.min_n <= self.max_n <= MAX_ORDER:
            raise PolicyError(
                f"A trace_memory policy needs {MIN_ORDER} <= min_n <= max_n <= {MAX_ORDER}, "
                f"got {self.min_n} and {self.max_n}."
            )
        if self.unit < 1:
            raise PolicyError(f"A trace_memory policy needs unit >= 1, got {self.unit}.")

    def start(self, prompt_ids: Sequence[int], traffic_class: str) -> TraceMemoryDrafter:
        index = ContextIndex(prompt_ids, self.min_n, self.max_n)
        return TraceMemoryDrafter(index, self.memory.lookup(traffic_class, self.unit), self.min_confidence)


def load(num_speculative_tokens: int, settings: Mapping[str, Any], files: Mapping[str, bytes]) -> TraceMemoryProposer:
    if set(files) != {MEMORY_FILE}:
        raise PolicyError(
            f"A trace_memory policy has one file, {MEMORY_FILE}, beside its manifest; got {sorted(files)}."
        )
    values = read_settings(ProposerKind.TRACE_MEMORY, settings, DEFAULTS)
    return TraceMemoryProposer(num_speculative_tokens, TraceMemory.parse(files[MEMORY_FILE]), **values)
