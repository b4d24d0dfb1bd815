"""One running request: its sequence, its drafter, its text, and what is counted of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from engine.contracts import FinishReason, SpecCounts, Status, TracePayload, VerifyStep
from engine.model.tokenizer import Tokenizer
from engine.runner.request import EngineRequest, Output, RequestResult
from engine.runner.stopping import StopText
from engine.scheduler.sequence import Sequence
from engine.speculation.proposer import Drafter, Proposer
from engine.speculation.verify import VerifyOutcome

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Times:
    """Instants of the engine's monotonic clock and durations, seconds."""

    added: float
    scheduled: float | None = None
    first_token: float | None = None
    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0


class Live:
    def __init__(self, request: EngineRequest, proposer: Proposer, tokenizer: Tokenizer, now: float) -> None:
        self.request = request
        self.sampling = request.sampling
        self.proposer = proposer  # pinned: loading or unloading versions later changes nothing here
        self.seq = Sequence(request.request_id, request.prompt_ids, request.sampling.max_tokens)
        self.rng = np.random.default_rng(request.sampling.seed)
        self.counts, self.steps = SpecCounts(), list[VerifyStep]()
        self.times = Times(added=now)
        self.draft_errors = 0
        self._text = StopText(tokenizer.detokenizer(), request.sampling.stop)
        self._eos = frozenset() if request.sampling.ignore_eos else tokenizer.eos_ids
        self._drafter: Drafter | None = None

    def draft(self, vocab_size: int) -> list[int]:
        """At most K tokens, never more than may still be emitted beside the target's own one.

        A proposer's failure costs its draft, not the request: plain decoding is always there.
        """
        k = min(self.proposer.num_speculative_tokens, self.seq.remaining - 1)
        if k <= 0:
            return []
        try:
            if self._drafter is None:
                self._drafter = self.proposer.start(self.request.prompt_ids, self.request.traffic_class)
                self._drafter.observe(self._output_ids)
            draft = self._drafter.propose(k)
            if len(draft) > k or not all(0 <= token < vocab_size for token in draft):
                raise ValueError(f"proposed {draft!r} for k = {k}, vocabulary {vocab_size}")
            return draft
        except Exception:
            self._draft_failed()
            return []

    def commit_first(self, token: int, now: float) -> Output:
        """The token that the prefill's last logits gave: output, but not a verify step."""
        self.times.first_token = now
        kept, text, reason = self._append((token,))
        return self._output(kept, text, reason, now)

    def commit(self, draft: list[int], outcome: VerifyOutcome, now: float) -> Output:
        """Append what was verified, up to a stop. What a stop cuts off was neither accepted nor rejected."""
        kept, text, reason = self._append(outcome.tokens)
        emitted = len(kept)
        if emitted <= outcome.accepted:
            step = VerifyStep(tuple(draft[:emitted]), emitted, emitted)
        else:
            step = VerifyStep(tuple(draft), outcome.accepted, emitted)
        self.counts.add(step)
        self.steps.append(step)
        if reason is None and self._drafter is not None:
            try:
                self._drafter.observe(kept)
            except Exception:
                self._draft_failed()
        return self._output(kept, text, reason, now)

    def end(self, status: Status, reason: FinishReason, now: float, error: str | None = None) -> Output:
        """The last output of a request that something else than its own tokens ended."""
        result = self._result(status, reason, now, error)
        return Output(self.request.request_id, (), "", True, reason, result)

    @property
    def _output_ids(self) -> list[int]:
        return self.seq.token_ids[self.seq.num_prompt :]

    def _draft_failed(self) -> None:
        """Count it, and let the next step begin with a fresh drafter: this one's state cannot be trusted."""
        self._drafter = None
        self.draft_errors += 1
        if self.draft_errors == 1:
            log.exception("policy %s cannot draft for %s", self.request.policy_version, self.request.request_id)

    def _append(self, tokens: tuple[int, ...]) -> tuple[list[int], str, FinishReason | None]:
        """(tokens kept, their text, why it ended). The token that ends a response belongs to it."""
        kept, text, reason = list[int](), "", None
        for token in tokens:
            kept.append(token)
            self.seq.token_ids.append(token)
            if token in self._eos:
                reason = FinishReason.STOP
                break
            piece, stopped = self._text.push(token)
            text += piece
            if stopped:
                return kept, text, FinishReason.STOP
            if self.seq.remaining == 0:
                reason = FinishReason.LENGTH
                break
        if reason is not None:
            piece, stopped = self._text.finish()
            text += piece
            reason = FinishReason.STOP if stopped else reason
        return kept, text, reason

    def _output(self, kept: list[int], text: str, reason: FinishReason | None, now: float) -> Output:
        result = None if reason is None else self._result(Status.OK, reason, now, None)
        return Output(self.request.request_id, tuple(kept), text, reason is not None, reason, result)

    def _result(self, status: Status, reason: FinishReason, now: float, error: str | None) -> RequestResult:
        times, n = self.times, self.seq.num_output
        e2e = now - times.added
        ttft = None if times.first_token is None else times.first_token - times.added
        return RequestResult(
            request_id=self.request.request_id,
            status=status,
            finish_reason=reason,
            policy_version=self.request.policy_version,
            traffic_class=self.request.traffic_class,
            text=self._text.text,
            prompt_tokens=self.seq.num_prompt,
            output_tokens=n,
            queue_s=None if times.scheduled is None else times.scheduled - times.added,
            ttft_s=ttft,
            tpot_s=None if ttft is None or n < 2 else (e2e - ttft) / (n - 1),
            e2e_s=e2e,
            prefill_s=times.prefill,
            draft_s=times.draft,
            verify_s=times.verify,
            counts=self.counts,
            draft_errors=self.draft_errors,
            payload=TracePayload(self.request.prompt_ids, tuple(self._output_ids), tuple(self.steps)),
            error=error,
        )
