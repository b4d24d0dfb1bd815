"""The gate's replay of policies that draft from hidden states, and what their drafting costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from engine.contracts import SpecCounts
from engine.model.draft import DraftConfig
from engine.model.kv_cache import KVCache
from engine.model.llama import Llama
from engine.runner.profile import CONTEXT
from engine.runner.target_pass import EagerPass
from engine.speculation.control import KController
from engine.speculation.draft_pool import DraftPool, Want
from engine.speculation.draft_pools import DraftPools
from engine.speculation.hybrid import BoundHybrid, HybridProposer
from engine.speculation.neural import BoundNeural, NeuralProposer
from engine.speculation.proposer import Proposer
from engine.speculation.rehearsal import Rehearsals, Rehearsing
from engine.speculation.replay import replay, replay_controlled
from engine.store.repositories.intake import TrainableTrace


class TargetReplayer:
    """The gate's replay for policies that draft from hidden states: by this process' own target.

    A draft pass is charged in proportion: what it costs here beside a target pass of one row, both measured once, is
    what it is taken to cost beside the engine's, which may be of another dtype or device. ``pass_s``: seconds instead,
    measured where K control's costs were. ``rehearsing`` is the learner's own memory by default: each held-out request
    goes through the target once for every draft.
    """

    def __init__(
        self,
        target: Llama,
        clock: Callable[[], float] = time.perf_counter,
        rehearsing: Rehearsing | None = None,
        pass_s: float | None = None,
    ) -> None:
        self._target, self._clock, self._pass_s = target, clock, pass_s
        self._rehearsing = rehearsing or Rehearsals()
        self._bound: dict[int, tuple[Proposer, Proposer, float]] = {}  # by id; the policy itself keeps the id taken
        self._row_s: float | None = None
        self._pass_of: dict[DraftConfig, float] = {}

    def __call__(
        self, proposer: Proposer, trace: TrainableTrace, controller: KController | None
    ) -> tuple[SpecCounts, float]:
        bound, pass_s = self.bound(proposer)
        name, prompt, output = trace.traffic_class, trace.prompt_ids, trace.output_ids
        if controller is None:
            return replay(bound, name, prompt, output, max_tokens=trace.max_tokens), 0.0
        there_s = pass_s * self._slowness(controller) if pass_s else 0.0
        return replay_controlled(bound, controller, 0, name, prompt, output, trace.max_tokens, there_s)

    def _slowness(self, controller: KController) -> float:
        """Seconds of a pass where the controller's costs were measured, per second here."""
        if self._pass_s is not None:
            return 1.0
        assert controller.costs is not None
        if self._row_s is None:
            self._row_s = one_row_pass_s(self._target, self._clock)
        return controller.costs(1) / self._row_s

    def bound(self, proposer: Proposer) -> tuple[Proposer, float]:
        """What is replayed for a policy, and the seconds that one pass of its draft costs here."""
        if id(proposer) not in self._bound:
            bound, pass_s = proposer, 0.0
            if isinstance(proposer, NeuralProposer | HybridProposer):
                pools = DraftPools(self._target, 1, self._target.config.max_position)
                pool = pools.take(proposer.draft, proposer.min_survival)
                if isinstance(proposer, NeuralProposer):
                    bound = BoundNeural(proposer, pool, self._rehearsing)
                else:
                    bound = BoundHybrid(proposer, pool, self._rehearsing)
                pass_s = self._price(pool) if self._pass_s is None else self._pass_s
            self._bound = {**dict(list(self._bound.items())[-3:]), id(proposer): (proposer, bound, pass_s)}
        _, bound, pass_s = self._bound[id(proposer)]
        return bound, pass_s

    def _price(self, pool: DraftPool) -> float:
        """One for all drafts of a shape: the noise of measuring each by itself would be a gain on every request."""
        shape = pool.network.config
        if shape not in self._pass_of:
            self._pass_of[shape] = draft_pass_s(pool, self._clock)
        return self._pass_of[shape]


def draft_pass_s(pool: DraftPool, clock: Callable[[], float], repeats: int = 9, context: int = 64) -> float:
    """Median seconds of one draft pass for one request."""
    target = pool.network.target
    aux = torch.zeros(1, 3 * target.config.hidden_size, dtype=target.dtype, device=target.device)
    state = pool.start([0] * context)
    pool.feed([(state, 0, aux.expand(context - 1, -1))])
    took = []
    for _ in range(repeats + 1):
        began = clock()
        pool.propose([Want(state, 1)])
        took.append(clock() - began)
        state.tokens.append(0)
        pool.feed([(state, len(state.tokens) - 2, aux)])
    pool.end(state)
    return median(took[1:])


@torch.inference_mode()
def one_row_pass_s(target: Llama, clock: Callable[[], float], repeats: int = 9) -> float:
    """Median seconds of a target pass over one row, by the pass and after the context that an engine profiles with."""
    cache = KVCache(target.config, 1, 1, target.dtype, target.device)
    one_pass = EagerPass(target, cache).trial(min(CONTEXT, target.config.max_position - 1), 1)
    took = []
    for _ in range(repeats + 1):
        began = clock()
        one_pass(1)
        took.append(clock() - began)
    return median(took[1:])
