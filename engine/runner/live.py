"""One running request: its sequence, its drafter, its text, and what is counted of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from engine.contracts import FinishReason, SpecCounts, Status, TracePayload, VerifyStep
from engine.model.tokenizer import Tokenizer
from engine.runner.request import EngineRequest, Output, RequestResult
from engine.runner.stopping import StopText
from engine.scheduler.sequence import Sequence as SequenceState
from engine.speculation.control import RowControl
from engine.speculation.proposer import Drafter, HiddenReader, InTurn, Proposer, Said, checked, judge, parts
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
    other: float = 0.0
    cost: float = 0.0
    plain: float = 0.0


@dataclass(frozen=True, slots=True)
class Draft:
    """What is proposed; K control decides how many of the tokens are verified.

    ``part``: which of the policy's drafters proposed it; ``said``: what each that was asked answered.
    """

    tokens: list[int]
    confidence: Sequence[float] = ()
    part: int = 0
    said: Sequence[Said] = ()


class Live:
    controls: Sequence[RowControl]  # one for each part of the policy; given once the request is queued

    def __init__(self, request: EngineRequest, proposer: Proposer, tokenizer: Tokenizer, now: float) -> None:
        self.request = request
        self.sampling = request.sampling
        self.proposer = proposer  # pinned: loading or unloading versions later changes nothing here
        self._most = int(proposer.num_speculative_tokens)  # read once, before anybody shares a step with it
        self.seq = SequenceState(request.request_id, request.prompt_ids, request.sampling.max_tokens, request.client)
        self._rng = np.random.default_rng(request.sampling.seed)
        self._uniforms: list[float] = []  # of the output positions to come
        self.expected_accepted = self.expected_plain_s = self.expected_cost_s = 0.0
        self.counts, self.steps = SpecCounts(), list[VerifyStep]()
        self.times = Times(added=now)
        self.draft_errors = 0
        self._text = StopText(tokenizer.detokenizer(), request.sampling.stop)
        self._eos = frozenset() if request.sampling.ignore_eos else tokenizer.eos_ids
        self._drafter: Drafter | None = None
        self._missed = False  # states that the drafter would have read
        self.reader = proposer if isinstance(proposer, HiddenReader) else None
        self.parts = parts(proposer)

    @property
    def most_drafts(self) -> int:
        """The policy's K, but never more than may still be emitted beside the target's own token."""
        return max(0, min(self._most, self.seq.remaining - 1))

    def uniforms(self, count: int) -> list[float]:
        """The draws of the next ``count`` output positions: each has its own, however often it is tried."""
        if (more := count - len(self._uniforms)) > 0:
            self._uniforms += self._rng.random(more).tolist()
        return self._uniforms[:count]

    def most_asked(self, limit: int) -> int:
        """Tokens to ask for where those that take time are limited. The parts before the last take none, but where
        asking them saves nothing they are asked for no more than the last one."""
        return self.most_drafts if self.parts > 1 and self.controls[0].asked else limit

    def draft(self, limit: int, vocab_size: int) -> Draft:
        """At most ``limit`` tokens that take time. A proposer's failure costs its draft, not the request: there is
        plain decoding."""
        k = self.most_asked(limit)
        if k <= 0:
            return Draft([])
        try:
            if self._drafter is None and self.reader is None:
                self._drafter = self.proposer.start(self.request.prompt_ids, self.request.traffic_class)
                self._drafter.observe(self._output_ids)
            if self._drafter is None:  # it has missed hidden states, and nobody has them any more
                return Draft([])
            if (drafter := self._in_turn) is not None:
                return self.drafted(limit, drafter.propose(k, limit), vocab_size)
            return self.drafted(limit, self._drafter.propose(k), vocab_size)
        except Exception:
            self.draft_failed()
            return Draft([])

    def drafted(self, limit: int, tokens: list[int], vocab_size: int) -> Draft:
        """What the drafter proposed when what takes time was limited so, checked."""
        drafter = self._drafter
        assert drafter is not None
        try:
            k = self.most_asked(limit)
            tokens, confidence = checked(drafter, k, tokens, vocab_size), drafter.confidence
            if (in_turn := self._in_turn) is not None:
                return Draft(tokens, confidence, in_turn.part, in_turn.said)
            return Draft(tokens, confidence, said=(Said(0, k, tokens, confidence),))
        except Exception:
            self.draft_failed()
            return Draft([])

    @property
    def _in_turn(self) -> InTurn | None:
        """The drafter, where it asks several parts: those of a policy with several do (``HiddenReader.parts``). To
        look at its methods is too slow for every row of a step."""
        return cast(InTurn, self._drafter) if self.parts > 1 else None

    def commit_first(self, token: int, now: float) -> Output:
        """The token that the prefill's last logits gave: output, but not a verify step."""
        self.times.first_token = now
        kept, text, reason = self._append((token,))
        if self.reader is not None and self._drafter is not None:  # others start with their first draft
            self._drafter.observe(kept)
        return self._output(kept, text, reason, now)

    def commit(self, draft: Draft, verified: int, outcome: VerifyOutcome, now: float, plain_s: float) -> Output:
        """Append the outcome of ``verified`` drafted tokens, up to a stop; what a stop cuts off counts as nothing.

        ``plain_s``: what plain decoding would have taken for each of them.
        """
        kept, text, reason = self._append(outcome.tokens)
        emitted = len(kept)
        self.times.plain += plain_s * emitted
        if emitted <= outcome.accepted:
            step = VerifyStep(tuple(draft.tokens[:emitted]), emitted, emitted)
        else:
            step = VerifyStep(tuple(draft.tokens[:verified]), outcome.accepted, emitted)
        judge(self.controls, draft.part, draft.said, step, draft.confidence, kept)
        self.counts.add(step)
        self.steps.append(step)
        if reason is None and self._drafter is not None:
            try:
                self._drafter.observe(kept)
            except Exception:
                self.draft_failed()
        return self._output(kept, text, reason, now)

    def guarded(self, commit: Callable[[], Output], now: float) -> Output:
        """What ``commit`` gives; should it fail, this request ends as it was before, and no other of its step."""
        tokens, text = len(self.seq.token_ids), len(self._text.text)
        try:
            return commit()
        except Exception as error:
            log.exception("the tokens of %s cannot be put out", self.request.request_id)
            del self.seq.token_ids[tokens:]
            self._text.text = self._text.text[:text]  # what was handed out, and no more
            return self.end(Status.ERROR, FinishReason.ERROR, now, f"{type(error).__name__}: {error}")

    def end(self, status: Status, reason: FinishReason, now: float, error: str | None = None) -> Output:
        """The last output of a request that something else than its own tokens ended."""
        result = self._result(status, reason, now, error)
        return Output(self.request.request_id, (), "", True, reason, result)

    @property
    def _output_ids(self) -> list[int]:
        return self.seq.token_ids[self.seq.num_prompt :]

    @property
    def drafter(self) -> Drafter | None:
        return self._drafter

    def begin(self, now: float) -> None:
        """The prompt is about to be computed, for the first time or once more after a preemption.

        A drafter that reads hidden states must hear them from the first on.
        """
        if self.times.scheduled is None:
            self.times.scheduled = now
        if self.reader is None:
            return
        self.leave()
        self._missed = False
        try:
            self._drafter = self.reader.start(self.request.prompt_ids, self.request.traffic_class)
            self._drafter.observe(self._output_ids)
        except Exception:
            self.draft_failed()

    def listens(self, position: int) -> bool:
        """Whether its drafter is given the states of its tokens from ``position`` on, about to be computed."""
        if self.reader is None or self._drafter is None:
            return False
        listening = self.controls[-1].listening
        if listening is not None and not listening.on:
            self._missed = True
        elif self._missed:
            self.reader.skip(self._drafter, position)
            self._missed = False
        return not self._missed

    def leave(self) -> None:
        """Give back what the drafter holds."""
        drafter, self._drafter = self._drafter, None
        if self.reader is not None and drafter is not None:
            self.reader.end(drafter)

    def draft_failed(self) -> None:
        """Count it, and let the next step begin with a fresh drafter: this one's state cannot be trusted.

        One that reads hidden states has no fresh start before the end of the request, which goes on without drafts.
        """
        self.leave()
        self.draft_errors += 1
        if self.draft_errors == 1:
            log.exception("policy %s cannot draft for %s", self.request.policy_version, self.request.request_id)

    def _append(self, tokens: tuple[int, ...]) -> tuple[list[int], str, FinishReason | None]:
        """(tokens kept, their text, why it ended). The token that ends a response belongs to it."""
        kept, text, reason = list[int](), "", None
        del self._uniforms[: len(tokens)]
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
            other_s=times.other,
            cost_s=times.cost,
            plain_s=times.plain,
            expected_accepted=self.expected_accepted,
            expected_plain_s=self.expected_plain_s,
            expected_cost_s=self.expected_cost_s,
            counts=self.counts,
            draft_errors=self.draft_errors,
            preemptions=self.seq.preemptions,
            payload=TracePayload(self.request.prompt_ids, tuple(self._output_ids), tuple(self.steps)),
            error=error,
        )
