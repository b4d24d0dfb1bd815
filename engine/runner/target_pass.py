"""The target's part of a step: one pass over all rows, and which drafted tokens it keeps.

Here every step is laid out anew, with exactly its tokens: what a CPU wants. ``captured_pass`` is for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from engine.contracts import SamplingParams
from engine.model.batch import Row
from engine.model.kv_cache import KVCache
from engine.model.llama import Llama
from engine.model.staged import upload
from engine.scheduler.scheduler import ScheduledStep
from engine.speculation.verify import VerifyOutcome, target_probabilities, verify_greedy, verify_one_hot


@dataclass(frozen=True, slots=True)
class Passed:
    """``outcomes`` of the decoding rows, then of the prompts that end.

    ``aux`` [N, len(layers) * hidden]: the outputs of the layers asked for, valid until the next pass. The tokens of the
    step's sequences begin at ``firsts`` in it, those that decode first.
    """

    outcomes: list[VerifyOutcome]
    aux: Tensor | None
    firsts: Sequence[int]


class Asking(Protocol):
    """What verification must know of a request; ``Live`` is one."""

    @property
    def sampling(self) -> SamplingParams: ...

    def uniforms(self, count: int) -> list[float]:
        """In [0, 1), one for each of the next ``count`` output positions."""


class TargetPass(Protocol):
    @property
    def most_rows(self) -> int:
        """Tokens of the largest pass there is room for."""
        ...

    def __call__(
        self,
        scheduled: ScheduledStep,
        drafts: Sequence[Sequence[int]],
        lives: Mapping[str, Asking],
        layers: Sequence[int],
    ) -> Passed:
        """Verify ``drafts``, one for each decoding row, and compute the step's prompts. ``layers``: those read."""
        ...

    def trial(self, context: int, most: int) -> Callable[[int], None]:
        """A pass over so many tokens after ``context`` others, which disturbs no request.

        They are at most ``most``, and that at most ``most_rows``.
        """
        ...

    def prepare(self, most_drafted: int, layers: Sequence[int] = ()) -> None:
        """Set up what steps with drafts of so many tokens, ``layers`` read, need before a request waits for it."""


Verify = Callable[[Sequence[Asking], Sequence[Sequence[int]], Tensor], list[VerifyOutcome]]
"""(requests, their drafts, logits [sum of (len(draft) + 1), vocab], one request after the other) → one outcome each."""


class EagerPass:
    def __init__(self, model: Llama, cache: KVCache, verify: Verify | None = None) -> None:
        self._model, self._cache, self.verify = model, cache, verify or verify_on_host
        self.most_rows = cache.num_slots * cache.max_len

    def __call__(
        self,
        scheduled: ScheduledStep,
        drafts: Sequence[Sequence[int]],
        lives: Mapping[str, Asking],
        layers: Sequence[int],
    ) -> Passed:
        rows = decode_rows(scheduled, drafts)
        prefills = [Row(c.seq.slot, c.start, c.seq.token_ids[c.start : c.start + c.count]) for c in scheduled.prefills]
        batch = self._model.lay_out(rows, prefills, self._cache.max_len)
        hidden, aux = self._model.forward_with_aux(batch, self._cache, layers)
        firsts = list(accumulate((len(row.token_ids) for row in [*rows, *prefills]), initial=0))
        logits = self._model.logits(hidden[self._wanted(firsts, scheduled)])
        ending = [chunk.seq for chunk in scheduled.prefills if chunk.gives_first_token]
        asking = [lives[seq.request_id] for seq in [*scheduled.decodes, *ending]]
        outcomes = self.verify(asking, [*drafts, *([] for _ in ending)], logits)
        return Passed(outcomes, aux, firsts[:-1])

    def trial(self, context: int, most: int) -> Callable[[int], None]:
        model = self._model
        cache = KVCache(model.config, 1, context + most, model.dtype, model.device)

        def run(count: int) -> None:
            batch = model.lay_out([Row(0, context, [0] * count)], [], cache.max_len)
            model.logits(model.forward(batch, cache)).max(-1).indices.tolist()

        return run

    def prepare(self, most_drafted: int, layers: Sequence[int] = ()) -> None:
        """Nothing is set up in advance."""

    def _wanted(self, firsts: Sequence[int], scheduled: ScheduledStep) -> Tensor | slice:
        """The rows whose logits are needed: every decode token, and the last token of a prompt.

        ``firsts``: where the tokens of each sequence begin, and where all end.
        """
        if not scheduled.prefills:
            return slice(None)
        decodes = len(scheduled.decodes)
        ends = zip(firsts[decodes + 1 :], scheduled.prefills, strict=True)
        rows = [*range(firsts[decodes]), *(end - 1 for end, chunk in ends if chunk.gives_first_token)]
        return upload(rows, torch.int64, self._model.device)


def decode_rows(scheduled: ScheduledStep, drafts: Sequence[Sequence[int]]) -> list[Row]:
    """The last token of each decoding sequence, and its draft."""
    return [
        Row(seq.slot, seq.num_computed, [seq.token_ids[-1], *draft])
        for seq, draft in zip(scheduled.decodes, drafts, strict=True)
    ]


def verify_on_host(lives: Sequence[Asking], drafts: Sequence[Sequence[int]], logits: Tensor) -> list[VerifyOutcome]:
    """One request after the other, as ``Verify``."""
    choices = logits.max(-1).indices.tolist()  # the first of equals, as argmax, in a quarter of its time on a CPU
    outcomes, first = [], 0
    for live, draft in zip(lives, drafts, strict=True):
        last = first + len(draft) + 1
        sampling = live.sampling
        if sampling.temperature == 0:
            outcomes.append(verify_greedy(choices[first:last], draft))
        else:
            p = target_probabilities(logits[first:last], sampling.temperature, sampling.top_k, sampling.top_p)
            outcomes.append(verify_one_hot(p, draft, live.uniforms(len(draft) + 1)))
        first = last
    return outcomes
