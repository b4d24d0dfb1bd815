"""The neural draft as a policy (EAGLE-3 shape, ``model/draft.py``). Greedy, so that its q is one-hot.

A policy is the same for every engine; ``bind`` gives it a target's hidden states to read, and keys and values for the
requests of one engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.contracts import ProposerKind
from engine.speculation.acceptance import DEFAULT_CONTROL, ControlSettings
from engine.speculation.draft_pool import DraftPool, Want
from engine.speculation.neural_file import SHAPE_FILE, WEIGHTS_FILE, DraftFile, unpack
from engine.speculation.proposer import PolicyError, read_settings, unbound
from engine.speculation.rehearsal import RehearsedDrafter, Rehearsing, rehearse

if TYPE_CHECKING:
    from torch import Tensor

    from engine.speculation.draft_pools import DraftPools

DEFAULTS: dict[str, int | float] = {"min_survival": 0.2}
"""A draft goes on while the probability that all of it is accepted, as the draft sees it, is at least this."""


@dataclass(frozen=True, slots=True)
class NeuralProposer:
    num_speculative_tokens: int
    draft: DraftFile
    min_survival: float = 0.2
    control: ControlSettings = DEFAULT_CONTROL
    kind: ProposerKind = ProposerKind.NEURAL

    def __post_init__(self) -> None:
        check_survival(self.kind, self.min_survival)

    def start(self, prompt_ids: Sequence[int], traffic_class: str) -> NeuralDrafter:
        raise unbound(self.kind)

    def bind(self, pools: DraftPools) -> BoundNeural:
        return BoundNeural(self, pools.take(self.draft, self.min_survival))


class NeuralDrafter:
    """One request's part of a pool."""

    def __init__(self, pool: DraftPool, prompt_ids: Sequence[int]) -> None:
        self.pool, self.state = pool, pool.start(prompt_ids)
        self.confidence: list[float] = []

    def propose(self, k: int) -> list[int]:
        return propose_together(self.pool, [(self, k, k)])[0]

    def observe(self, tokens: Sequence[int]) -> None:
        self.state.tokens.extend(tokens)


class BoundNeural:
    """A neural policy in one engine."""

    parts = 1

    def __init__(self, policy: NeuralProposer, pool: DraftPool, rehearsing: Rehearsing = rehearse) -> None:
        self.policy, self.pool, self._rehearsing = policy, pool, rehearsing
        self.kind, self.control = policy.kind, policy.control
        self.num_speculative_tokens = policy.num_speculative_tokens
        self.aux_layers = pool.network.config.aux_layers

    def start(self, prompt_ids: Sequence[int], traffic_class: str) -> NeuralDrafter:
        return NeuralDrafter(self.pool, prompt_ids)

    def propose(self, wants: Sequence[tuple[NeuralDrafter, int, int]]) -> list[list[int]]:
        return propose_together(self.pool, wants)

    def feed(self, fed: Sequence[tuple[NeuralDrafter, int, Tensor]]) -> None:
        self.pool.feed([(drafter.state, start, aux) for drafter, start, aux in fed])

    def skip(self, drafter: NeuralDrafter, position: int) -> None:
        self.pool.skip(drafter.state, position)

    def end(self, drafter: NeuralDrafter) -> None:
        self.pool.end(drafter.state)

    def rehearse(self, prompt_ids: Sequence[int], output_ids: Sequence[int], traffic_class: str) -> RehearsedDrafter:
        rehearsal = self._rehearsing(
            self.pool.network, prompt_ids, output_ids, self.num_speculative_tokens, self.pool.min_survival
        )
        return RehearsedDrafter(rehearsal, self.pool.min_survival)

    @property
    def in_use(self) -> int:
        return self.pool.in_use


def propose_together(pool: DraftPool, wants: Sequence[tuple[NeuralDrafter, int, int]]) -> list[list[int]]:
    """One draft each, for (drafter, k, limit); each drafter keeps its confidence."""
    asked = [(drafter, min(k, limit)) for drafter, k, limit in wants if min(k, limit) > 0]
    proposals = pool.propose([Want(drafter.state, k) for drafter, k in asked])
    for drafter, _, _ in wants:
        drafter.confidence = []
    for (drafter, _), proposal in zip(asked, proposals, strict=True):
        drafter.confidence = proposal.confidence
    made = {id(drafter): proposal.tokens for (drafter, _), proposal in zip(asked, proposals, strict=True)}
    return [made.get(id(drafter), []) for drafter, _, _ in wants]


def check_survival(kind: ProposerKind, min_survival: float) -> None:
    if not 0 <= min_survival < 1:
        raise PolicyError(f"A {kind} policy needs 0 <= min_survival < 1, got {min_survival}.")


def load(num_speculative_tokens: int, settings: Mapping[str, Any], files: Mapping[str, bytes]) -> NeuralProposer:
    if set(files) != {SHAPE_FILE, WEIGHTS_FILE}:
        raise PolicyError(
            f"A neural policy has the files {SHAPE_FILE} and {WEIGHTS_FILE} beside its manifest; got {sorted(files)}."
        )
    values = read_settings(ProposerKind.NEURAL, settings, DEFAULTS)
    return NeuralProposer(num_speculative_tokens, unpack(files), **values)
