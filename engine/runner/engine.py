"""The engine: requests go in, outputs come out, one ``step`` at a time. One thread owns it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from engine.contracts import FinishReason, SlipstreamError, Status, TraceRecord
from engine.model.graphs import Capture, TimedCapture, graphs_on
from engine.model.kv_cache import KVCache
from engine.model.loading import Target
from engine.runner.live import Live
from engine.runner.request import EngineRequest, Output, RequestResult
from engine.runner.rescoring import Prefill, Rescoring
from engine.runner.runner import Runner
from engine.runner.shadowing import ShadowReplay
from engine.scheduler.scheduler import Scheduler
from engine.speculation.control import KController
from engine.speculation.draft_pools import DraftPools
from engine.speculation.proposer import HiddenReader, NeedsTarget, Proposer

__all__ = ["Engine", "EngineRequest", "InvalidRequest", "Output", "PolicyNotResident", "RequestResult"]

log = logging.getLogger(__name__)


class InvalidRequest(SlipstreamError):
    """A request that can never run: says which part of it is wrong (HTTP 400)."""


class PolicyNotResident(SlipstreamError):
    """A request or a plan names a policy version that was not loaded."""


class Engine:
    def __init__(
        self,
        target: Target,
        *,
        max_num_seqs: int = 16,
        max_model_len: int = 2048,
        prefill_chunk: int = 256,
        max_queue: int = 256,
        kv_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        capture_on: Callable[[torch.device], Capture | None] = graphs_on,
    ) -> None:
        """``max_model_len`` is cut to what the model's positions allow; ``kv_tokens``: of all that run together.

        ``capture_on``: how passes of fixed shapes run on a device (``graphs_on``, ``no_graphs_on``).
        """
        self.target, self.clock = target, clock
        self.max_model_len = min(max_model_len, target.config.max_position)
        self.scheduler = Scheduler(max_num_seqs, self.max_model_len, prefill_chunk, max_queue, kv_tokens=kv_tokens)
        self.draft_errors = 0  # of requests that ended
        self.step_errors = 0
        self.output_tokens = 0  # of all requests, as they come
        self.control = KController()  # verifies whole drafts until it is given step costs
        found = capture_on(target.model.device)
        capture = None if found is None else TimedCapture(found, clock)
        self.runner = Runner(target.model, self.control, max_num_seqs, self.max_model_len, clock, capture)
        self._loaded: dict[int, Proposer] = {}
        self._proposers: dict[int, Proposer] = {}  # the same, bound to this target where they need one
        self._lives: dict[str, Live] = {}
        self._leaving: list[HiddenReader] = []  # unloaded, with requests that began with them
        self._pools = DraftPools(target.model, max_num_seqs, self.max_model_len, capture)
        self._shadows: dict[int, Proposer] = {}  # bound once more, for one request that nobody waits for
        self._scratch: dict[str, KVCache] = {}

    def load(self, version: int, proposer: Proposer) -> None:
        """Make a policy resident. A version is immutable: loading another policy under its number is refused."""
        if version in self._loaded:
            if self._loaded[version] is not proposer:
                raise SlipstreamError(f"Policy version {version} is resident already; versions never change.")
            return
        bound: Proposer = proposer
        if isinstance(proposer, NeedsTarget):
            bound = self._bind(proposer)
        self._loaded[version], self._proposers[version] = proposer, bound

    def unload(self, version: int) -> None:
        """Forget a policy; requests that began with it keep it to their end."""
        self._loaded.pop(version, None)
        bound = self._proposers.pop(version, None)
        if isinstance(bound, HiddenReader):
            self._leaving.append(bound)
            self._let_go()
        self._shadows.pop(version, None)
        self.control.forget(version)

    @property
    def resident(self) -> tuple[int, ...]:
        return tuple(sorted(self._proposers))

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises a SlipstreamError (QueueFull, RequestTooLong, …) and then has queued nothing."""
        if request.request_id in self._lives:
            raise InvalidRequest(f"A request {request.request_id!r} is running already.")
        vocab = self.target.config.vocab_size
        if not all(0 <= token < vocab for token in request.prompt_ids):
            raise InvalidRequest(f"The prompt holds token ids outside the vocabulary of {vocab}.")
        sampling = request.sampling
        if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
            raise InvalidRequest("Sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0.")
        proposer = self._proposers.get(request.policy_version)
        if proposer is None:
            raise PolicyNotResident(f"Policy version {request.policy_version} is not loaded; {self.resident} are.")
        live = Live(request, proposer, self.target.tokenizer, self.clock())
        settings = proposer.control  # a policy that fails must do so before anything is queued
        self.scheduler.add(live.seq)
        # Only now: what is refused must not push the experience of others out.
        live.controls = self.control.rows(
            request.policy_version, request.traffic_class, settings, live.parts, reads=live.reader is not None
        )
        self._lives[request.request_id] = live

    def cancel(self, request_id: str, status: Status = Status.CANCELLED) -> Output | None:
        """End a request now and free its slot: its last output with its result, or None if it is not here."""
        if request_id not in self._lives:
            return None
        return self._forget(request_id).end(status, FinishReason.CANCELLED, self.clock())

    def step(self) -> list[Output]:
        """Run one step; a failure of the model ends the requests of that step and no others."""
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return []
        try:
            outputs = self.runner.step(scheduled, self._lives)
        except Exception as error:
            log.exception("a step failed; its %d requests end with it", len(scheduled.sequences))
            self.step_errors += 1
            message, now = f"{type(error).__name__}: {error}", self.clock()
            failed = [self._forget(seq.request_id) for seq in scheduled.sequences]
            return [live.end(Status.ERROR, FinishReason.ERROR, now, message) for live in failed]
        for output in outputs:
            self.output_tokens += len(output.new_token_ids)
            if output.finished:
                self._forget(output.request_id)
        return outputs

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def rescore(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> Rescoring:
        """The target's word on a greedy response, to be advanced between steps. One at a time: they share a cache."""
        return Rescoring(self.target.model, self._cache("rescore"), prompt_ids, output_ids)

    def shadow(self, version: int, record: TraceRecord) -> ShadowReplay:
        """What a resident policy would have drafted on a finished request: as ``rescore``, and to be ended."""
        proposer, payload = self._loaded.get(version), record.payload
        if proposer is None or payload is None:
            raise PolicyNotResident(f"Policy version {version} is not loaded, or the request has no tokens.")
        prefill, bound = None, self._proposers[version]
        if isinstance(proposer, NeedsTarget):  # a place of its own: those of the engine are for requests
            ids = [*payload.prompt_ids, *payload.output_ids[:-1]]
            prefill = Prefill(self.target.model, self._cache("shadow"), ids)
            if version not in self._shadows:
                self._shadows[version] = proposer.bind(DraftPools(self.target.model, 1, self.max_model_len))
            bound = self._shadows[version]
        return ShadowReplay(
            bound,
            prefill,
            record.traffic_class,
            payload.prompt_ids,
            payload.output_ids,
            record.max_tokens,
            self.target.config.vocab_size,
            self.clock,
        )

    def stats(self) -> dict[str, int]:
        """Gauges ``running``, ``waiting`` and ``kv_blocks``; the others are counters."""
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "draft_errors": self.draft_errors + sum(live.draft_errors for live in list(self._lives.values())),
            "step_errors": self.step_errors,
            "preemptions": self.scheduler.preemptions,
            "kv_blocks": self.scheduler.blocks_in_use,
        }

    def check_integrity(self) -> None:
        self.scheduler.check_integrity()
        assert self._lives.keys() == self.scheduler.waiting.keys() | self.scheduler.running.keys()
        for proposer in self._proposers.values():
            if isinstance(proposer, HiddenReader):
                held = sum(live.reader is proposer and live.drafter is not None for live in self._lives.values())
                assert held == proposer.in_use, f"{held} requests draft by {proposer.kind}, {proposer.in_use} places"

    def _cache(self, use: str) -> KVCache:
        """Room for one sequence beside those that are served."""
        model = self.target.model
        if use not in self._scratch:
            self._scratch[use] = KVCache(model.config, 1, self.max_model_len, model.dtype, model.device)
        return self._scratch[use]

    def _forget(self, request_id: str) -> Live:
        self.scheduler.finish(request_id)
        live = self._lives.pop(request_id)
        live.leave()
        self.draft_errors += live.draft_errors
        self._let_go()
        return live

    def _bind(self, proposer: NeedsTarget) -> HiddenReader:
        bound = proposer.bind(self._pools)
        if not self.has_work:  # else a size waits for its first step: all of them at once would hold everybody up
            for layers in ((), bound.aux_layers):  # a step in which nobody listens hands out none
                self.runner.target_pass.prepare(bound.num_speculative_tokens, layers)
            bound.pool.prepare(bound.num_speculative_tokens)
        return bound

    def _let_go(self) -> None:
        """Give the pools of unloaded policies back once their last request, waiting ones included, is gone."""
        for bound in [b for b in self._leaving if all(live.reader is not b for live in self._lives.values())]:
            self._leaving.remove(bound)
            self._pools.give_back(bound.pool)
