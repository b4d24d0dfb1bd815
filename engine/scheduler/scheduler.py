"""Which sequences run in this step. Plain integers, no torch.

A running sequence has a slot, and blocks of the KV cache for the tokens it has and may draft in the next step. Every
decoding sequence runs in every step; prompts are computed in chunks under a token budget beside them, so that a long
prompt delays its neighbours by one chunk and not by itself. When the blocks run out, the sequence that was admitted
last gives up its own and is computed again later. The oldest can always go on, so everything ends.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field

from engine.scheduler.errors import QueueFull, RequestTooLong
from engine.scheduler.queue import FairQueue
from engine.scheduler.sequence import NO_SLOT, Sequence

BLOCK = 16
"""Tokens in a block of the KV cache."""
LOOKAHEAD = 1 + 32
"""Tokens that one step may write beyond the committed ones: the next input and the longest draft a policy may have."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """Compute ``count`` tokens of ``seq`` from position ``start``."""

    seq: Sequence
    start: int
    count: int

    @property
    def gives_first_token(self) -> bool:
        """The prompt ends here, and nothing has been put out yet: its last logits give the first token."""
        return self.start + self.count == self.seq.num_prefill == self.seq.num_prompt and not self.seq.num_output


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
        kv_tokens: int | None = None,
    ) -> None:
        """Prompt tokens in a step: ``prefill_chunk`` of one sequence, ``max_prefill_tokens`` (2 chunks) of all.

        ``kv_tokens`` bounds the tokens of all running sequences together; None: as many as the slots can hold.
        """
        self.max_num_seqs, self.max_model_len, self.max_queue = max_num_seqs, max_model_len, max_queue
        self.prefill_chunk = prefill_chunk
        self.max_prefill_tokens = max_prefill_tokens or 2 * prefill_chunk
        self.num_blocks = max_num_seqs * -(-max_model_len // BLOCK) if kv_tokens is None else kv_tokens // BLOCK
        self.waiting = FairQueue()
        self.running: OrderedDict[str, Sequence] = OrderedDict()  # in the order of their admission
        self.preemptions = 0
        self._free = list(range(max_num_seqs))  # a heap: the lowest free slot first keeps the used ones together

    def add(self, seq: Sequence) -> None:
        if seq.num_prompt < 1 or seq.max_tokens < 1:
            raise RequestTooLong(
                f"A request needs a prompt and room for output, got {seq.num_prompt} prompt tokens and "
                f"max_tokens {seq.max_tokens}."
            )
        need, room = seq.num_prompt + seq.max_tokens, min(self.max_model_len, self.num_blocks * BLOCK)
        if need > room:
            raise RequestTooLong(
                f"{seq.num_prompt} prompt tokens and max_tokens {seq.max_tokens} are {need} together; "
                f"this engine holds {room}. Shorten the prompt or lower max_tokens."
            )
        if len(self.waiting) >= self.max_queue:
            raise QueueFull(f"{len(self.waiting)} requests wait already, the limit of this engine. Try again later.")
        self.waiting.push(seq)

    def schedule(self) -> ScheduledStep:
        """All that decode, and prompt chunks within the budget: those that have begun, then new ones in order."""
        free = self._make_room()
        step = ScheduledStep()
        budget = self.max_prefill_tokens
        for seq in self.running.values():
            if not seq.in_prefill:
                step.decodes.append(seq)
            elif budget:
                budget -= self._chunk(step, seq, budget)
        while budget and self.waiting and self._free:
            seq = self.waiting.head()
            if (need := self._blocks(seq)) > free:
                break
            free -= need
            self.waiting.remove(seq.request_id)
            seq.slot = heapq.heappop(self._free)
            self.running[seq.request_id] = seq
            if not seq.preemptions:  # what is computed again is no service to its client
                self.waiting.charge(seq.client, prompt_tokens=seq.num_prefill)
            budget -= self._chunk(step, seq, budget)
        return step

    def finish(self, request_id: str) -> Sequence | None:
        """Forget a sequence, wherever it is, and free its slot and blocks now."""
        if (seq := self.waiting.remove(request_id)) is not None:
            return seq
        if (seq := self.running.pop(request_id, None)) is not None:
            heapq.heappush(self._free, seq.slot)
            seq.slot = NO_SLOT
            self.waiting.charge(seq.client, output_tokens=seq.num_output)
            self.waiting.forget({other.client for other in self.running.values()})
        return seq

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def blocks_in_use(self) -> int:
        running = list(self.running.values())  # other threads ask, while sequences come and go
        return sum(map(self._blocks, running))

    def check_integrity(self) -> None:
        """Every slot is free or owned once, blocks are within bounds, every sequence is in a possible state."""
        owned = [seq.slot for seq in self.running.values()]
        assert sorted(owned + self._free) == list(range(self.max_num_seqs)), (owned, self._free)
        assert not self.waiting.keys() & self.running.keys()
        for seq in self.waiting.values():
            assert (seq.slot, seq.num_computed) == (NO_SLOT, 0), seq
            assert seq.preemptions or not seq.num_output, seq
        for seq in self.running.values():
            assert len(seq.token_ids) <= seq.num_prompt + seq.max_tokens <= self.max_model_len, seq
            computed = seq.num_prompt if not seq.num_output else len(seq.token_ids) - 1
            assert seq.num_computed == computed or seq.in_prefill, seq

    def _make_room(self) -> int:
        """Preempt the youngest until the blocks suffice for the next step of the others; blocks that stay free."""
        free = self.num_blocks - self.blocks_in_use
        while free < 0:
            _, seq = self.running.popitem()
            free += self._blocks(seq)
            heapq.heappush(self._free, seq.slot)
            seq.preempt()
            self.preemptions += 1
            self.waiting.push_back(seq)
        return free

    def _blocks(self, seq: Sequence) -> int:
        """Blocks for what a sequence has and what its next step may write, at most what it can ever need."""
        most = min(len(seq.token_ids) + LOOKAHEAD, seq.num_prompt + seq.max_tokens)
        return -(-most // BLOCK)

    def _chunk(self, step: ScheduledStep, seq: Sequence, budget: int) -> int:
        count = min(seq.num_prefill - seq.num_computed, self.prefill_chunk, budget)
        step.prefills.append(Prefill(seq, seq.num_computed, count))
        return count
