"""One step: draft, verify, commit. One target pass for all rows, whatever their policies.

A row is verified with its own drafts, sampled with its own generator and committed on its own, so what a request gets
does not depend on who shares its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engine.model.batch import Batch, Row, build_batch
from engine.model.kv_cache import KVCache
from engine.model.llama import Llama
from engine.runner.live import Live
from engine.runner.request import Output
from engine.scheduler.scheduler import ScheduledStep
from engine.speculation.verify import VerifyOutcome, target_probabilities, verify_greedy, verify_sampled


class Runner:
    def __init__(self, model: Llama, max_num_seqs: int, max_model_len: int, clock: Callable[[], float]) -> None:
        self.model, self.clock = model, clock
        self.cache = KVCache(model.config, max_num_seqs, max_model_len, model.dtype, model.device)

    @torch.inference_mode()
    def step(self, scheduled: ScheduledStep, lives: Mapping[str, Live]) -> list[Output]:
        """Outputs of the rows that got tokens. ``lives`` holds the requests of ``scheduled`` by their ids."""
        decoding = [lives[seq.request_id] for seq in scheduled.decodes]
        ending = [lives[chunk.seq.request_id] for chunk in scheduled.prefills if chunk.is_last]
        drafts = [self._draft(live) for live in decoding]

        began = self.clock()
        for chunk in scheduled.prefills:
            if chunk.start == 0:
                lives[chunk.seq.request_id].times.scheduled = began
        batch = self._batch(scheduled, drafts)
        hidden = self.model.forward(batch, self.cache)
        logits = self.model.logits(hidden[self._wanted(batch, scheduled)])
        outcomes = _verify([*decoding, *ending], [*drafts, *([] for _ in ending)], logits)
        now = self.clock()

        for chunk in scheduled.prefills:
            lives[chunk.seq.request_id].times.prefill += now - began
            chunk.seq.num_computed += chunk.count
        outputs = []
        for live, draft, outcome in zip(decoding, drafts, outcomes, strict=False):
            live.times.verify += now - began
            outputs.append(live.commit(draft, outcome, now))
            # The last token committed is the next step's first input; rejected places are overwritten then.
            live.seq.num_computed = len(live.seq.token_ids) - 1
        for live, outcome in zip(ending, outcomes[len(decoding) :], strict=True):
            outputs.append(live.commit_first(outcome.tokens[0], now))
        return outputs

    def _draft(self, live: Live) -> list[int]:
        began = self.clock()
        draft = live.draft(self.model.config.vocab_size)
        live.times.draft += self.clock() - began
        return draft

    def _batch(self, scheduled: ScheduledStep, drafts: list[list[int]]) -> Batch:
        decodes = [
            Row(seq.slot, seq.num_computed, [seq.token_ids[-1], *draft])
            for seq, draft in zip(scheduled.decodes, drafts, strict=True)
        ]
        prefills = [Row(c.seq.slot, c.start, c.seq.token_ids[c.start : c.start + c.count]) for c in scheduled.prefills]
        model = self.model
        return build_batch(decodes, prefills, self.cache.max_len, model.config.group_size, model.dtype, model.device)

    def _wanted(self, batch: Batch, scheduled: ScheduledStep) -> Tensor | slice:
        """The rows whose logits are needed: every decode token, and the last token of a prompt."""
        num_decode = batch.decode.num_tokens if batch.decode is not None else 0
        if not batch.prefills:
            return slice(None)
        chunks = zip(batch.prefills, scheduled.prefills, strict=True)
        rows = [*range(num_decode), *(group.last - 1 for group, chunk in chunks if chunk.is_last)]
        return torch.tensor(rows, dtype=torch.int64, device=self.model.device)


def _verify(lives: list[Live], drafts: list[list[int]], logits: Tensor) -> list[VerifyOutcome]:
    """One outcome per request; ``logits`` [sum of (len(draft) + 1), vocab] lie one request after the other."""
    choices = logits.argmax(-1).tolist()
    outcomes, first = [], 0
    for live, draft in zip(lives, drafts, strict=True):
        last = first + len(draft) + 1
        sampling = live.sampling
        if sampling.temperature == 0:
            outcomes.append(verify_greedy(choices[first:last], draft))
        else:
            p = target_probabilities(logits[first:last], sampling.temperature, sampling.top_k, sampling.top_p)
            outcomes.append(verify_sampled(p, draft, None, live.rng.random(len(draft) + 1).tolist()))
        first = last
    return outcomes
