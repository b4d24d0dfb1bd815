"""Drafting on a CPU where the kernels fit: a whole draft of all requests in one call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.model.batch import Row
from engine.model.draft import DraftNetwork
from engine.model.draft_kernels import DraftKernels
from engine.speculation.draft_pool import DraftPool, Proposal, Want


class CompiledPool(DraftPool):
    def __init__(
        self, network: DraftNetwork, num_seqs: int, max_len: int, min_survival: float, kernels: DraftKernels
    ) -> None:
        super().__init__(network, num_seqs, max_len, min_survival)
        self._kernels = kernels

    def _draft(self, wants: Sequence[Want], rows: Sequence[Row], aux: Tensor) -> list[Proposal]:
        made = self._kernels.draft(rows, [want.k for want in wants], aux, self.cache, self.min_survival)
        return [Proposal(tokens, chances) for tokens, chances in made]

    def _remember(self, rows: Sequence[Row], aux: Tensor) -> None:
        self._kernels.remember(rows, aux, self.cache)
