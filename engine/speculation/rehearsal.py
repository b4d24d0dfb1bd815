"""What a neural draft would have proposed at every place of a stored response, computed at once.

One prefill of the target gives the hidden states, then the chains from all places go on together, each as long as it
would in serving; the drafter then only looks up. With its drafts the stored response can be replayed as for any other
proposer (``replay``). The prefill is nearly all of the cost, so ``Rehearsals`` remembers what came of it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from engine.model.draft import DraftNetwork
from engine.model.draft_unroll import attend_chains
from engine.model.states import aux_states

MOST_REMEMBERED = 1_024
"""Responses, some 30 kB each: twice what one gate looks at under two drafts."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """``tokens`` and ``chances`` of the chains that start after 1, 2, … committed output tokens, at most K each."""

    tokens: list[list[int]]
    chances: list[list[float]]


Rehearsing = Callable[[DraftNetwork, Sequence[int], Sequence[int], int, float], Rehearsal]
"""``rehearse``, or what remembers its answers."""


@torch.inference_mode()
def rehearse(
    network: DraftNetwork, prompt_ids: Sequence[int], output_ids: Sequence[int], k: int, min_survival: float
) -> Rehearsal:
    """Chains of at most ``k`` tokens, each up to the token with which it is less likely than ``min_survival`` that all
    are accepted; nothing where the response is too short to draft in."""
    ids = [*prompt_ids, *output_ids]
    begin, last = len(prompt_ids) - 1, len(ids) - 2
    if last <= begin:
        return Rehearsal([], [])
    fused = network.fuse(aux_states(network.target, ids[:last], network.config.aux_layers))
    device, room = fused.device, network.target.config.max_position
    query, key, value = network.project(
        torch.tensor(ids[1 : last + 1], device=device), fused, torch.arange(last, device=device)
    )
    starts, hidden, query = torch.arange(begin, last, device=device), fused[begin:], query[begin:]
    survival = torch.ones(last - begin, device=device)
    keys, values = list[Tensor](), list[Tensor]()  # of the chains that go on, their own since the start
    found = Rehearsal([[] for _ in range(begin, last)], [[] for _ in range(begin, last)])
    for step in range(1, k + 1):
        seen = torch.arange(last, device=device) <= starts[:, None]
        hidden = network.finish(hidden, attend_chains(query, key, value, seen, keys, values))
        tokens, chances = network.likeliest(hidden)
        survival = survival * chances
        for start, token, chance in zip(starts.tolist(), tokens.tolist(), chances.tolist(), strict=True):
            found.tokens[start - begin].append(token)
            found.chances[start - begin].append(chance)
        going = (survival >= min_survival) & (starts + step < room)
        if step == k or not bool(going.any()):
            break
        starts, hidden, survival = starts[going], hidden[going], survival[going]
        query, own_key, own_value = network.project(tokens[going], hidden, starts + step)
        keys = [*(one[going] for one in keys), own_key]
        values = [*(one[going] for one in values), own_value]
    return found


class Rehearsals:
    """``rehearse``, remembered by the draft's weights and the response: a gate replays the same requests under
    candidate and champion, whole and under K control, and looks at them again for the next candidate."""

    def __init__(self, most: int = MOST_REMEMBERED) -> None:
        self.most = most
        self.known = OrderedDict[tuple[str, str], Rehearsal]()  # by draft and request, the last used last
        self._names = WeakKeyDictionary[DraftNetwork, str]()  # of those that somebody still holds

    def __call__(
        self, network: DraftNetwork, prompt_ids: Sequence[int], output_ids: Sequence[int], k: int, min_survival: float
    ) -> Rehearsal:
        asked = repr((list(prompt_ids), list(output_ids), k, min_survival))
        key = (self.name(network), hashlib.sha256(asked.encode()).hexdigest()[:32])
        if key not in self.known:
            self.known[key] = self.make(key, network, prompt_ids, output_ids, k, min_survival)
            if len(self.known) > self.most:
                self.known.popitem(last=False)
        self.known.move_to_end(key)
        return self.known[key]

    def make(
        self, key: tuple[str, str], network: DraftNetwork, prompt_ids: Sequence[int], output_ids: Sequence[int],
        k: int, min_survival: float,
    ) -> Rehearsal:  # fmt: skip
        """What is not remembered; ``key`` names draft and request."""
        return rehearse(network, prompt_ids, output_ids, k, min_survival)

    def name(self, network: DraftNetwork) -> str:
        """The sha256 of a draft's shape, weights, vocabulary and dtype."""
        if network not in self._names:
            digest = hashlib.sha256(repr((network.config, network.target.dtype)).encode())
            for tensor in (network.vocabulary, *(network.weights[name] for name in sorted(network.weights))):
                digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
            self._names[network] = digest.hexdigest()
        return self._names[network]


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
