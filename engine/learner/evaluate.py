"""What a draft network would be accepted of sequences whose target states are known, without running the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.learner.features import Example
from engine.learner.trainer import pack
from engine.model.draft import DraftNetwork
from engine.model.draft_unroll import unroll


@dataclass(slots=True)
class ClassAcceptance:
    """Counts of greedy verify steps with K drafts each; ``accepted_per_pos``[s]: steps that accepted more than s."""

    steps: int = 0
    accepted_per_pos: list[int] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float:
        """1 + accepted / steps, bonus included."""
        return 1 + sum(self.accepted_per_pos) / self.steps if self.steps else 1.0

    def __str__(self) -> str:
        shares = " ".join(f"{n / max(1, self.steps):.2f}" for n in self.accepted_per_pos)
        return f"{self.acceptance_length:.3f} ({shares}; {self.steps} steps)"


@torch.inference_mode()
def acceptance(
    network: DraftNetwork, examples: Sequence[tuple[str, Example]], k: int = 4
) -> dict[str, ClassAcceptance]:
    """By traffic class, over (class, example): the verify steps that greedy decoding with K = ``k`` would have made.

    A chain that goes on with known tokens is accepted exactly as far as one that goes on with its own.
    """
    vocabulary = network.vocabulary
    places = torch.full((network.target.config.vocab_size,), -1, dtype=torch.int64, device=vocabulary.device)
    places[vocabulary] = torch.arange(network.config.vocab_size, device=vocabulary.device)
    found: dict[str, ClassAcceptance] = {}
    for name, one in examples:
        counts = found.setdefault(name, ClassAcceptance(accepted_per_pos=[0] * k))
        batch = pack([one], network.target)
        truth = places[batch.truth]
        outputs = unroll(network, batch.token_ids, network.fuse(batch.aux), batch.segments, k)
        right = torch.stack([network.logits(output).argmax(-1) == truth for output in outputs])
        accepted = accepted_from(right).tolist()
        start = 0
        while start < len(accepted):  # a verify step drafts from slot `start` on
            counts.steps += 1
            for s in range(accepted[start]):
                counts.accepted_per_pos[s] += 1
            start += accepted[start] + 1
    return dict(sorted(found.items()))


def accepted_from(right: Tensor) -> Tensor:
    """[M]: how many tokens of the chain that begins at each slot are right, the s-th ``right``[s] [k, M] s slots on."""
    chains = torch.zeros_like(right)
    for s, row in enumerate(right):
        chains[s, : len(row) - s] = row[s:]
    return chains.long().cumprod(0).sum(0)
