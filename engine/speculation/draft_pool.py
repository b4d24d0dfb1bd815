"""The working state of one neural draft in one engine: keys and values of its requests, drafted for together.

A request's state is the target's hidden states of its committed tokens, nothing imagined: after every verification the
true states of the accepted tokens take the places of what the draft made up (EAGLE; vLLM #14649 lost 8-15 % of the
acceptance length without). The slots that wait for their next proposal go into its first pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.model.batch import Row, build_batch
from engine.model.draft import DraftNetwork
from engine.speculation.proposer import PolicyError

MOST_WAITING = 16
"""Slots that wait for the next proposal; more are stored at once, so a silent request holds no states."""


@dataclass(slots=True, eq=False)
class DraftState:
    """One request in a pool.

    ``tokens``: prompt and what was committed after it, from position ``first`` on, which is slot 0. Slots [0, stored)
    have true keys and values; those after them wait in ``waiting`` [n, 3 * hidden]. -1 is no place in the pool.
    """

    place: int
    tokens: list[int]
    stored: int = 0
    waiting: list[Tensor] = field(default_factory=list)
    num_waiting: int = 0
    first: int = 0

    @property
    def known(self) -> int:
        """Slots whose hidden states came in."""
        return self.stored + self.num_waiting


@dataclass(frozen=True, slots=True)
class Want:
    """At most ``k`` tokens are wanted for a request."""

    state: DraftState
    k: int


@dataclass(frozen=True, slots=True)
class Proposal:
    tokens: list[int]
    confidence: list[float]


class DraftPool:
    def __init__(self, network: DraftNetwork, num_seqs: int, max_len: int, min_survival: float) -> None:
        """A draft goes on while the probability that all of it is accepted is at least ``min_survival``.

        The token that falls under it is still proposed: its pass is paid, and K control knows what a row costs.
        """
        self.network, self.max_len, self.min_survival = network, max_len, min_survival
        self.cache = network.cache(num_seqs, max_len)
        self._free = list(range(num_seqs))

    def start(self, prompt_ids: Sequence[int]) -> DraftState:
        if not self._free:
            raise PolicyError(f"The draft has places for {self.cache.num_slots} requests, and all are taken.")
        place = min(self._free)  # the lowest: attention reads the places up to the highest in use
        self._free.remove(place)
        return DraftState(place, list(prompt_ids))

    def end(self, state: DraftState) -> None:
        """Give the place back; a second time changes nothing."""
        if state.place >= 0:
            self._free.append(state.place)
            state.place, state.waiting, state.num_waiting = -1, [], 0

    def skip(self, state: DraftState, position: int) -> None:
        """Nobody handed over what lies before ``position``: its slots begin there. Positions are only ever compared."""
        del state.tokens[: position - state.first]
        state.first, state.stored, state.waiting, state.num_waiting = position, 0, [], 0

    def prepare(self, most_drafted: int) -> None:
        """Set up what drafts of so many tokens need, before a request waits for it: nothing here."""

    @property
    def in_use(self) -> int:
        return self.cache.num_slots - len(self._free)

    @torch.inference_mode()
    def feed(self, fed: Sequence[tuple[DraftState, int, Tensor]]) -> None:
        """(request, position of the first state, aux states [n, 3 * hidden]): what the target said of its tokens.

        Positions that are known already are passed over: a prompt that is computed again changes nothing.
        """
        for state, start, aux in fed:
            known = state.first + state.known
            if start > known:
                raise PolicyError(f"States from position {start} came in, but those from {known} are missing.")
            fresh = aux[known - start :]
            if fresh.shape[0]:
                state.waiting.append(fresh.clone())  # the next pass may write where these are
                state.num_waiting += fresh.shape[0]
        self._store([state for state, _, _ in fed if state.num_waiting > MOST_WAITING])

    @torch.inference_mode()
    def propose(self, wants: Sequence[Want]) -> list[Proposal]:
        """Drafts for all of ``wants`` (k >= 1), their passes made together; a row's draft is what it gets alone."""
        if not wants:
            return []
        for want in wants:
            if want.state.known != len(want.state.tokens) - 1 or not want.state.num_waiting:
                raise PolicyError(
                    f"The states of {want.state.known} slots are known, of {len(want.state.tokens)} tokens: "
                    "a draft needs those of all tokens but the last."
                )
        rows = [Row(w.state.place, w.state.stored, w.state.tokens[w.state.stored + 1 :]) for w in wants]
        proposals = self._draft(wants, rows, torch.cat([states for w in wants for states in w.state.waiting]))
        for want in wants:
            want.state.stored, want.state.waiting, want.state.num_waiting = len(want.state.tokens) - 1, [], 0
        return proposals

    def _draft(self, wants: Sequence[Want], rows: Sequence[Row], aux: Tensor) -> list[Proposal]:
        """``rows``: the slots of ``wants`` that wait; ``aux`` [all their tokens, 3 * hidden]: their states."""
        output = self._forward(rows, self.network.fuse(aux))
        ends = torch.tensor([len(row.token_ids) for row in rows]).cumsum(0) - 1
        return self._chain(wants, rows, output[ends.to(output.device)])

    def _chain(self, wants: Sequence[Want], slots: Sequence[Row], output: Tensor) -> list[Proposal]:
        """Draft on from each request's last true slot, whose outputs are ``output`` [rows, hidden]."""
        network = self.network
        proposals = [Proposal([], []) for _ in wants]
        survival, active, step = [1.0] * len(wants), list(range(len(wants))), 0
        while active:
            found, chances = network.likeliest(output)
            going, kept = list[int](), list[int]()
            for row, (i, token, chance) in enumerate(zip(active, found.tolist(), chances.tolist(), strict=True)):
                survival[i] *= chance
                proposals[i].tokens.append(token)
                proposals[i].confidence.append(chance)
                if len(proposals[i].tokens) < wants[i].k and survival[i] >= self.min_survival:
                    going.append(i)
                    kept.append(row)
            if not going:
                break
            rows = [Row(slots[i].slot, slots[i].end + step, proposals[i].tokens[-1:]) for i in going]
            hidden = output if len(kept) == output.shape[0] else output[torch.tensor(kept, device=output.device)]
            output, active, step = self._forward(rows, hidden), going, step + 1
        return proposals

    def _forward(self, rows: Sequence[Row], hidden: Tensor) -> Tensor:
        network = self.network
        config, target = network.config, network.target
        group = config.num_heads // config.num_kv_heads
        batch = build_batch(rows, [], self.max_len, group, target.dtype, target.device)
        return network.forward(batch, hidden, self.cache)

    def _store(self, states: Sequence[DraftState]) -> None:
        """Keys and values of all waiting slots but each request's last, which its next draft starts from."""
        rows, aux = list[Row](), list[Tensor]()
        for state in states:
            count = min(state.num_waiting, len(state.tokens) - 1 - state.stored) - 1
            if count <= 0:
                continue
            waiting = torch.cat(state.waiting)
            rows.append(Row(state.place, state.stored, state.tokens[state.stored + 1 : state.stored + 1 + count]))
            aux.append(waiting[:count])
            state.stored, state.num_waiting = state.stored + count, state.num_waiting - count
            state.waiting = [waiting[count:].clone()]
        if rows:
            self._remember(rows, torch.cat(aux))

    def _remember(self, rows: Sequence[Row], aux: Tensor) -> None:
        target = self.network.target
        batch = build_batch(rows, [], self.max_len, 1, target.dtype, target.device)
        self.network.store(batch, self.network.fuse(aux), self.cache)
