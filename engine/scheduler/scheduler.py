"""Which sequences run in this step. Plain integers, first come first served, nothing is ever preempted.

A sequence that is admitted gets a slot long enough for all it may ever need, so admission is the only decision that
can fail. Every decoding sequence runs in every step; prompts are computed in chunks under a token budget beside them,
so that a long prompt delays its neighbours by one chunk and not by itself.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field

from engine.scheduler.errors import QueueFull, RequestTooLong
from engine.scheduler.sequence import NO_SLOT, Sequence


@dataclass(frozen=True, slots=True)
class Prefill:
    """Compute ``count`` prompt tokens of ``seq`` from position ``start``."""

    seq: Sequence
    start: int
    count: int

    @property
    def is_last(self) -> bool:
        return self.start + self.count == self.seq.num_prompt


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    prefills: list[Prefill] = field(default_factory=list)
    decodes: list[Sequence] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.prefills or self.decodes)

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.decodes, *(prefill.seq for prefill in self.prefills)]


class Scheduler:
    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        prefill_chunk: int = 256,
        max_queue: int = 256,
        max_prefill_tokens: int | None = None,
    ) -> None:
        """Prompt tokens in a step: ``prefill_chunk`` of one sequence, ``max_prefill_tokens`` (2 chunks) of all."""
        self.max_num_seqs, self.max_model_len, self.max_queue = max_num_seqs, max_model_len, max_queue
        self.prefill_chunk = prefill_chunk
        self.max_prefill_tokens = max_prefill_tokens or 2 * prefill_chunk
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        self.running: OrderedDict[str, Sequence] = OrderedDict()
        self._free = list(range(max_num_seqs))  # a heap: the lowest free slot first keeps the used ones together

    def add(self, seq: Sequence) -> None:
        if seq.num_prompt < 1 or seq.max_tokens < 1:
            raise RequestTooLong(
                f"A request needs a prompt and room for output, got {seq.num_prompt} prompt tokens and "
                f"max_tokens {seq.max_tokens}."
            )
        if (need := seq.num_prompt + seq.max_tokens) > self.max_model_len:
            raise RequestTooLong(
                f"{seq.num_prompt} prompt tokens and max_tokens {seq.max_tokens} are {need} together; "
                f"this engine holds {self.max_model_len}. Shorten the prompt or lower max_tokens."
            )
        if len(self.waiting) >= self.max_queue:
            raise QueueFull(f"{len(self.waiting)} requests wait already, the limit of this engine. Try again later.")
        self.waiting[seq.request_id] = seq

    def schedule(self) -> ScheduledStep:
        """All that decode, and prompt chunks within the budget: those that have begun, then new ones in order."""
        step = ScheduledStep()
        budget = self.max_prefill_tokens
        for seq in self.running.values():
            if not seq.in_prefill:
                step.decodes.append(seq)
            elif budget:
                budget -= self._chunk(step, seq, budget)
        while budget and self.waiting and self._free:
            request_id, seq = self.waiting.popitem(last=False)
            seq.slot = heapq.heappop(self._free)
            self.running[request_id] = seq
            budget -= self._chunk(step, seq, budget)
        return step

    def finish(self, request_id: str) -> Sequence | None:
        """Forget a sequence, wherever it is, and free its slot now."""
        if (seq := self.waiting.pop(request_id, None)) is not None:
            return seq
        if (seq := self.running.pop(request_id, None)) is not None:
            heapq.heappush(self._free, seq.slot)
            seq.slot = NO_SLOT
        return seq

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def check_integrity(self) -> None:
        """Every slot is free or owned once, and every sequence is in a possible state."""
        owned = [seq.slot for seq in self.running.values()]
        assert sorted(owned + self._free) == list(range(self.max_num_seqs)), (owned, self._free)
        assert not self.waiting.keys() & self.running.keys()
        for seq in self.waiting.values():
            assert (seq.slot, seq.num_computed, seq.num_output) == (NO_SLOT, 0, 0), seq
        for seq in self.running.values():
            assert len(seq.token_ids) <= seq.num_prompt + seq.max_tokens <= self.max_model_len, seq
            computed = seq.num_prompt if not seq.num_output else len(seq.token_ids) - 1
            assert seq.num_computed == computed or (seq.in_prefill and not seq.num_output), seq

    def _chunk(self, step: ScheduledStep, seq: Sequence, budget: int) -> int:
        count = min(seq.num_prompt - seq.num_computed, self.prefill_chunk, budget)
        step.prefills.append(Prefill(seq, seq.num_computed, count))
        return count
