"""The target's part of a step on CUDA: padded to a few sizes, captured once for each, and judged on the device.

The host writes tokens, positions and places, starts a graph, and waits once: for the counts of accepted tokens and the
target's own. Steps that compute prompts as well are laid out anew; there the products are large and launches are not
what costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from engine.model.graphs import Body, Capture, Graphs
from engine.model.kv_cache import KVCache
from engine.model.llama import Llama
from engine.model.padded import Bucket, PaddedRows
from engine.model.staged import Staged, upload
from engine.runner.target_pass import Asking, EagerPass, Passed, decode_rows
from engine.scheduler.scheduler import ScheduledStep
from engine.speculation.verify import VerifyOutcome, accepted_counts, draw_tokens, verify_greedy

TRIAL_WIDTH = 5
"""Tokens of a row in passes that only measure: an input and four drafted ones."""


class CapturedPass:
    def __init__(self, model: Llama, cache: KVCache, capture: Capture) -> None:
        self._model, self._cache = model, cache
        self._padded = PaddedRows(cache, model.config.group_size, model.dtype, model.device)
        self.graphs = Graphs(capture)
        self._eager = EagerPass(model, cache, verify_on_device)
        self.most_rows = most = self._padded.most_tokens
        self._answers = Staged(most + cache.num_slots, torch.int64, model.device)  # choices, then accepted
        self._logits = torch.zeros(most, model.config.vocab_size, dtype=model.dtype, device=model.device)
        self._aux: dict[tuple[int, ...], Tensor] = {}

    def __call__(
        self,
        scheduled: ScheduledStep,
        drafts: Sequence[Sequence[int]],
        lives: Mapping[str, Asking],
        layers: Sequence[int],
    ) -> Passed:
        if scheduled.prefills:
            return self._eager(scheduled, drafts, lives, layers)
        rows = decode_rows(scheduled, drafts)
        bucket = self._padded.bucket(rows)
        replay = self._prepared(bucket, tuple(layers))
        self._padded.fill(bucket, rows)
        replay()
        n, width = bucket.tokens, bucket.width
        firsts = [row.slot * width for row in rows]
        asking = [lives[seq.request_id] for seq in scheduled.decodes]
        if draw_sampled(asking, drafts, firsts, self._logits[:n], self._answers.device[:n]):
            self._judge(bucket)
        answers = [int(number) for number in self._answers.fetch(n + bucket.rows)]
        outcomes = []
        for row, first in zip(rows, firsts, strict=True):
            accepted = answers[n + row.slot]
            outcomes.append(VerifyOutcome(accepted, tuple(answers[first : first + accepted + 1])))
        return Passed(outcomes, self._aux[tuple(layers)][:n] if layers else None, firsts)

    def trial(self, context: int, most: int) -> Callable[[int], None]:
        """Nothing but padding: it costs what tokens cost, and writes where nobody reads."""
        slots, longest = self._cache.num_slots, self._cache.max_len

        def run(count: int) -> None:
            width = max(min(count, TRIAL_WIDTH), -(-count // slots))
            bucket = self._padded.bucket_of(-(-count // width), width, min(context + width, longest))
            replay = self._prepared(bucket, ())
            self._padded.park(bucket)
            replay()
            self._answers.fetch(bucket.tokens + bucket.rows)

        return run

    def prepare(self, most_drafted: int, layers: Sequence[int] = ()) -> None:
        for bucket in self._padded.buckets(1 + most_drafted):
            self._prepared(bucket, tuple(layers))

    def _prepared(self, bucket: Bucket, layers: tuple[int, ...]) -> Body:
        if layers and layers not in self._aux:
            shape = (self._padded.most_tokens, len(layers) * self._model.config.hidden_size)
            self._aux[layers] = torch.zeros(shape, dtype=self._model.dtype, device=self._model.device)
        return self.graphs.get(
            (bucket, layers), lambda: self._compute(bucket, layers), lambda: self._padded.park(bucket)
        )

    @torch.inference_mode()
    def _compute(self, bucket: Bucket, layers: tuple[int, ...]) -> None:
        """What is captured: from the padded inputs to ``_logits``, ``_aux`` and ``_answers``."""
        n = bucket.tokens
        hidden, aux = self._model.forward_with_aux(self._padded.batch(bucket), self._cache, layers)
        if aux is not None:
            self._aux[layers][:n].copy_(aux)
        logits = self._logits[:n].copy_(self._model.logits(hidden))
        self._answers.device[:n].copy_(logits.max(-1).indices)
        self._judge(bucket)

    def _judge(self, bucket: Bucket) -> None:
        n, shape = bucket.tokens, (bucket.rows, bucket.width)
        tokens = self._padded.token_ids(bucket)
        accepted = accepted_counts(self._answers.device[:n].view(shape), tokens, self._padded.counts(bucket))
        self._answers.device[n : n + bucket.rows].copy_(accepted)


def draw_sampled(
    lives: Sequence[Asking], drafts: Sequence[Sequence[int]], firsts: Sequence[int], logits: Tensor, choices: Tensor
) -> bool:
    """Put drawn tokens in ``choices`` [N] for the requests that sample; whether there are any.

    ``firsts``: where each request's len(draft) + 1 rows begin in ``logits`` [N, vocab] and ``choices``.
    """
    places, top_k = list[int](), list[int]()
    temperature, top_p, uniforms = list[float](), list[float](), list[float]()
    for live, draft, first in zip(lives, drafts, firsts, strict=True):
        sampling, count = live.sampling, len(draft) + 1
        if sampling.temperature > 0:
            places += range(first, first + count)
            top_k += [sampling.top_k] * count
            temperature += [sampling.temperature] * count
            top_p += [sampling.top_p] * count
            uniforms += live.uniforms(count)
    if not places:
        return False
    at, most = (upload(values, torch.int64, logits.device) for values in (places, top_k))
    heat, mass, draws = (upload(values, torch.float64, logits.device) for values in (temperature, top_p, uniforms))
    choices.index_copy_(0, at, draw_tokens(logits[at], heat, most, mass, draws))
    return True


def verify_on_device(lives: Sequence[Asking], drafts: Sequence[Sequence[int]], logits: Tensor) -> list[VerifyOutcome]:
    """As ``target_pass.Verify``: tokens are drawn where the logits are, and come over together."""
    choices, firsts, first = logits.max(-1).indices, [], 0
    for draft in drafts:
        firsts.append(first)
        first += len(draft) + 1
    draw_sampled(lives, drafts, firsts, logits, choices)
    found = choices.tolist()
    return [
        verify_greedy(found[first : first + len(draft) + 1], draft) for first, draft in zip(firsts, drafts, strict=True)
    ]
