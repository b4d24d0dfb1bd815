"""Where the neural drafts of one engine work.

With captured passes a pool is worth keeping: when the last request of a policy that was unloaded is gone, the next
draft of the same shape is copied into its weights, and no graph is captured again.
"""

from __future__ import annotations

from engine.contracts import SlipstreamError
from engine.model.draft import DraftNetwork
from engine.model.draft_kernels import compile_draft, compile_for
from engine.model.graphs import Capture
from engine.model.llama import Llama
from engine.speculation.captured_pool import CapturedPool
from engine.speculation.compiled_pool import CompiledPool
from engine.speculation.draft_pool import DraftPool
from engine.speculation.neural_file import DraftFile
from engine.speculation.proposer import PolicyError


class DraftPools:
    def __init__(self, target: Llama, num_seqs: int, max_len: int, capture: Capture | None = None) -> None:
        """Room for ``num_seqs`` requests of ``max_len`` tokens in each pool; ``capture`` as in ``Runner``."""
        self.target, self.num_seqs, self.max_len = target, num_seqs, max_len
        self._capture = capture
        self._idle: list[CapturedPool] = []
        compile_for(target)

    def take(self, draft: DraftFile, min_survival: float) -> DraftPool:
        """A pool that drafts by ``draft``; a PolicyError where that does not fit the target."""
        for pool in self._idle:
            if pool.network.config == draft.config:
                pool.network.copy_weights(draft.weights, draft.vocabulary)
                pool.min_survival = min_survival
                self._idle.remove(pool)
                return pool
        try:
            network = DraftNetwork(draft.config, draft.weights, draft.vocabulary, self.target)
        except SlipstreamError as error:
            raise PolicyError(f"This draft cannot stand on the target: {error}") from None
        if self._capture is not None:
            return CapturedPool(network, self.num_seqs, self.max_len, min_survival, self._capture)
        if (kernels := compile_draft(network)) is not None:
            return CompiledPool(network, self.num_seqs, self.max_len, min_survival, kernels)
        return DraftPool(network, self.num_seqs, self.max_len, min_survival)

    def give_back(self, pool: DraftPool) -> None:
        """Nobody drafts in ``pool`` any more, nor ever will by the draft that is in it now."""
        if isinstance(pool, CapturedPool):
            if pool.in_use:
                raise SlipstreamError(f"A draft's pool was given back while {pool.in_use} requests draft in it.")
            self._idle.append(pool)
