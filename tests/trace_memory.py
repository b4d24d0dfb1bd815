"""A trace memory of a few responses, without a learner."""

from __future__ import annotations

from collections.abc import Sequence

from engine.speculation.memory_build import count_pairs, write_memory


class TraceMemoryBuilder:
    """``add`` responses in any order, then ``build``: each counts once. Nothing depends on order or hash seeds."""

    def __init__(self, min_n: int = 2, max_n: int = 4) -> None:
        self.min_n, self.max_n = min_n, max_n
        self._responses: dict[str, list[tuple[Sequence[int], Sequence[int]]]] = {}

    def add(self, traffic_class: str, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        self._responses.setdefault(traffic_class, []).append((prompt_ids, output_ids))

    def build(self, max_bytes: int) -> bytes:
        counted = {name: count_pairs(found, self.min_n, self.max_n) for name, found in self._responses.items()}
        return write_memory(counted, max_bytes)
