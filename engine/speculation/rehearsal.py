"""What a neural draft would have proposed at every place of a stored response, computed at once.

One prefill of the target gives the hidden states, one ``unroll`` the chains from all places; the drafter then only
looks up. With its drafts the stored response can be replayed as for any other proposer (``replay``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.draft import DraftNetwork
from engine.model.draft_unroll import Segment, unroll
from engine.model.states import hidden_states


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """``tokens`` and ``chances`` [places][K] of the chains that start after 1, 2, … committed output tokens."""

    tokens: list[list[int]]
    chances: list[list[float]]


Rehearsing = Callable[[DraftNetwork, Sequence[int], Sequence[int], int], Rehearsal]
"""``rehearse``, or what remembers its answers."""


@torch.inference_mode()
def rehearse(network: DraftNetwork, prompt_ids: Sequence[int], output_ids: Sequence[int], k: int) -> Rehearsal:
    """Chains of ``k`` tokens; nothing where the response is too short to draft in."""
    ids = [*prompt_ids, *output_ids]
    begin, last = len(prompt_ids) - 1, len(ids) - 2
    if last <= begin:
        return Rehearsal([], [])
    _, aux = hidden_states(network.target, ids[:last], network.config.aux_layers)
    # Chains at the end go on over slots that no state is known of: they imagine theirs, as everywhere.
    fused = F.pad(network.fuse(aux), (0, 0, 0, k - 1))
    following = torch.tensor([*ids[1 : last + 1], *[0] * (k - 1)], device=fused.device)
    outputs = unroll(
        network, following, fused, [Segment(0, begin, last + k - 1)], k, lambda out: _best(network, out)[0]
    )
    found = [_best(network, output) for output in outputs]
    count = last - begin
    tokens = torch.stack([found[s][0][s : s + count] for s in range(k)], 1)
    chances = torch.stack([found[s][1][s : s + count] for s in range(k)], 1)
    return Rehearsal(tokens.tolist(), chances.tolist())


def _best(network: DraftNetwork, output: Tensor) -> tuple[Tensor, Tensor]:
    """(likeliest token as target id, its probability), [rows] both."""
    logits = network.logits(output)
    best, at = logits.max(-1)
    return network.vocabulary[at], (best - logits.logsumexp(-1)).exp()


class RehearsedDrafter:
    """Proposes what was rehearsed, as long as what is observed is the stored response."""

    def __init__(self, rehearsal: Rehearsal, min_survival: float) -> None:
        self.rehearsal, self.min_survival = rehearsal, min_survival
        self.confidence: list[float] = []
        self.passes = 0  # that the draft itself would have made for what it was asked
        self._observed = 0

    def propose(self, k: int) -> list[int]:
        self.confidence, survival = [], 1.0
        place = self._observed - 1
        for chance in self.rehearsal.chances[place][:k]:
            survival *= chance
            self.confidence.append(chance)
            if survival < self.min_survival:
                break
        self.passes += len(self.confidence)
        return self.rehearsal.tokens[place][: len(self.confidence)]

    def observe(self, tokens: Sequence[int]) -> None:
        self._observed += len(tokens)
