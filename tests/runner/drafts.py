"""Neural drafts for tests: one of random weights, one that is a copy of its target, one that was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.contracts import ProposerKind
from engine.learner.features import example
from engine.learner.trainer import Trainer, TrainOptions, choose_vocabulary, fresh_weights
from engine.model.batch import Row, build_batch
from engine.model.draft import DraftConfig, DraftNetwork
from engine.model.kv_cache import KVCache
from engine.model.loading import Target
from engine.runner.engine import RequestResult
from engine.speculation.acceptance import DEFAULT_CONTROL, ControlSettings
from engine.speculation.draft_pool import DraftPool, DraftState
from engine.speculation.draft_pools import DraftPools
from engine.speculation.neural import BoundNeural, NeuralProposer
from engine.speculation.neural_file import DraftFile, pack, unpack


def random_draft(target: Target, vocab_size: int = 64, seed: int = 0) -> DraftFile:
    config = DraftConfig.of_target(target.config, vocab_size)
    ids = torch.randperm(target.config.vocab_size, generator=torch.Generator().manual_seed(seed))[:vocab_size]
    weights = fresh_weights(config, target.model, seed)
    for name in ("qkv", "out", "gate_up", "down"):
        weights[name] *= 8  # lively: what it says depends on all it sees
    return unpack(pack(config, weights, ids.sort().values))


def trained_draft(target: Target, answers: Sequence[RequestResult], steps: int) -> DraftFile:
    """A draft that learned these answers well."""
    payloads = [answer.payload for answer in answers]
    config = DraftConfig.of_target(target.config, 128)
    vocabulary = choose_vocabulary([payload.output_ids for payload in payloads], 128, target.config.vocab_size)
    options = TrainOptions(lr=2e-2, lr_end=4e-3, total_steps=steps, warmup=5, slots_per_step=10_000)
    trainer = Trainer(target.model, config, fresh_weights(config, target.model, 0), vocabulary, options)
    examples = [
        example(target.model, payload.prompt_ids, payload.output_ids, config.aux_layers, torch.float64)
        for payload in payloads
    ]
    for _ in range(steps):
        trainer.step(examples)
    return unpack(pack(config, trainer.weights, vocabulary))


@dataclass(frozen=True, slots=True)
class Neural:
    """A neural policy whose pool a test may have replaced by a faulty or an all-knowing one."""

    proposer: NeuralProposer
    make: type[DraftPool] = DraftPool
    num_speculative_tokens: int = 4
    control: ControlSettings = DEFAULT_CONTROL
    kind: ProposerKind = ProposerKind.NEURAL

    def start(self, prompt_ids: Sequence[int], traffic_class: str) -> object:
        raise AssertionError("not bound")

    def bind(self, pools: DraftPools) -> BoundNeural:
        draft, survival = self.proposer.draft, self.proposer.min_survival
        if self.make is DraftPool:
            return BoundNeural(self.proposer, pools.take(draft, survival))
        network = DraftNetwork(draft.config, draft.weights, draft.vocabulary, pools.target)
        return BoundNeural(self.proposer, self.make(network, pools.num_seqs, pools.max_len, survival))


def neural(draft: DraftFile, make: type[DraftPool] = DraftPool, k: int = 4, min_survival: float = 0.0) -> Neural:
    return Neural(NeuralProposer(k, draft, min_survival), make, k)


class CopyPool(DraftPool):
    """Drafts by running the target itself: slot i, which knows x[i+1], is the target's position i + 1."""

    def __init__(self, network: DraftNetwork, num_seqs: int, max_len: int, min_survival: float) -> None:
        super().__init__(network, num_seqs, max_len + 1, min_survival)
        target = network.target
        self.cache = KVCache(target.config, num_seqs, max_len + 1, target.dtype)
        network.logits = target.logits  # type: ignore[method-assign]
        network.vocabulary = torch.arange(target.config.vocab_size)

    def start(self, prompt_ids: Sequence[int]) -> DraftState:
        state = super().start(prompt_ids)
        self._run([Row(state.place, 0, prompt_ids[:1])])  # no slot knows the first token
        return state

    def _forward(self, rows: Sequence[Row], hidden: Tensor) -> Tensor:
        return self._run([replace(row, start=row.start + 1) for row in rows])

    def _remember(self, rows: Sequence[Row], aux: Tensor) -> None:
        self._forward(rows, aux)

    def _run(self, rows: Sequence[Row]) -> Tensor:
        target = self.network.target
        group = target.config.group_size
        batch = build_batch(rows, [], self.max_len, group, target.dtype, target.device)
        return target.forward(batch, self.cache)


class LatePool(DraftPool):
    """A planted fault: every state comes one position late, so slots pair tokens with the wrong states."""

    def feed(self, fed: Sequence[tuple[DraftState, int, Tensor]]) -> None:
        super().feed([(state, start, aux.roll(1, 0)) for state, start, aux in fed])


class DreamingPool(DraftPool):
    """A planted fault: what the draft imagined of accepted tokens is never replaced by what the target said."""

    def propose(self, wants):  # type: ignore[no-untyped-def]
        for state in (want.state for want in wants):
            dreamt = state.num_waiting - 1
            if getattr(self, "_seen", None) and state.place in self._seen and dreamt > 0:
                state.waiting = [torch.cat(state.waiting)[dreamt:]]
                state.stored, state.num_waiting = state.stored + dreamt, 1
            self._seen = getattr(self, "_seen", set()) | {state.place}
        return super().propose(wants)

    def end(self, state: DraftState) -> None:
        self._seen = getattr(self, "_seen", set()) - {state.place}
        super().end(state)
