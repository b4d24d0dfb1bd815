"""Memory and neural draft together: the longest confident match from memory first, the draft where memory is silent.

Memory costs nothing and learns from the first requests; the neural draft costs a pass per token and generalises. While
memory speaks, the draft's slots wait, and are caught up with in the first pass of its next turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.contracts import ProposerKind
from engine.speculation import memory, neural
from engine.speculation.control import DEFAULT_CONTROL, ControlSettings
from engine.speculation.memory import MEMORY_FILE, TraceMemory, TraceMemoryDrafter, TraceMemoryProposer
from engine.speculation.neural import NeuralDrafter, check_survival, propose_together
from engine.speculation.neural_file import SHAPE_FILE, WEIGHTS_FILE, DraftFile, unpack
from engine.speculation.proposer import PolicyError, read_settings, unbound
from engine.speculation.rehearsal import RehearsedDrafter, Rehearsing, rehearse

if TYPE_CHECKING:
    from torch import Tensor

    from engine.speculation.draft_pool import DraftPool
    from engine.speculation.draft_pools import DraftPools

REMEMBERED, DRAFTED = 0, 1
"""The parts of a hybrid, in the order in which they are asked."""
DEFAULTS: dict[str, int | float] = memory.DEFAULTS | neural.DEFAULTS


@dataclass(frozen=True, slots=True)
class HybridProposer:
    num_speculative_tokens: int
    memory: TraceMemoryProposer
    draft: DraftFile
    min_survival: float = 0.2
    control: ControlSettings = DEFAULT_CONTROL
    kind: ProposerKind = ProposerKind.HYBRID

    def __post_init__(self) -> None:
        check_survival(self.kind, self.min_survival)

    def start(self, prompt_ids: Sequence[int], traffic_class: str) -> HybridDrafter:
        raise unbound(self.kind)

    def bind(self, pools: DraftPools) -> BoundHybrid:
        return BoundHybrid(self, pools.take(self.draft, self.min_survival))


class HybridDrafter:
    def __init__(self, remembering: TraceMemoryDrafter, drafting: NeuralDrafter) -> None:
        self.remembering, self.drafting = remembering, drafting
        self.confidence: Sequence[float] = ()
        self.part = REMEMBERED

    def propose(self, k: int, limit: int | None = None) -> list[int]:
        return _propose(self.drafting.pool, [(self, k, k if limit is None else limit)])[0]

    def observe(self, tokens: Sequence[int]) -> None:
        self.remembering.observe(tokens)
        self.drafting.observe(tokens)


class BoundHybrid:
    """A hybrid policy in one engine."""

    parts = 2

    def __init__(self, policy: HybridProposer, pool: DraftPool, rehearsing: Rehearsing = rehearse) -> None:
        self.policy, self.pool, self._rehearsing = policy, pool, rehearsing
        self.kind, self.control = policy.kind, policy.control
        self.num_speculative_tokens = policy.num_speculative_tokens
        self.aux_layers = pool.network.config.aux_layers

    def start(self, prompt_ids: Sequence[int], traffic_class: str) -> HybridDrafter:
        return HybridDrafter(self.policy.memory.start(prompt_ids, traffic_class), NeuralDrafter(self.pool, prompt_ids))

    def propose(self, wants: Sequence[tuple[HybridDrafter, int, int]]) -> list[list[int]]:
        return _propose(self.pool, wants)

    def feed(self, fed: Sequence[tuple[HybridDrafter, int, Tensor]]) -> None:
        self.pool.feed([(drafter.drafting.state, start, aux) for drafter, start, aux in fed])

    def end(self, drafter: HybridDrafter) -> None:
        self.pool.end(drafter.drafting.state)

    def rehearse(self, prompt_ids: Sequence[int], output_ids: Sequence[int], traffic_class: str) -> RehearsedHybrid:
        rehearsal = self._rehearsing(
            self.pool.network, prompt_ids, output_ids, self.num_speculative_tokens, self.pool.min_survival
        )
        return RehearsedHybrid(
            self.policy.memory.start(prompt_ids, traffic_class), RehearsedDrafter(rehearsal, self.pool.min_survival)
        )

    @property
    def in_use(self) -> int:
        return self.pool.in_use


class RehearsedHybrid:
    """A hybrid's drafter over a stored response (``rehearsal``)."""

    def __init__(self, remembering: TraceMemoryDrafter, rehearsed: RehearsedDrafter) -> None:
        self.remembering, self.rehearsed = remembering, rehearsed
        self.confidence: Sequence[float] = ()
        self.part = REMEMBERED

    def propose(self, k: int, limit: int | None = None) -> list[int]:
        if draft := self.remembering.propose(k):
            self.part, self.confidence = REMEMBERED, self.remembering.confidence
            return draft
        draft = self.rehearsed.propose(k, limit)
        self.part, self.confidence = DRAFTED, self.rehearsed.confidence
        return draft

    @property
    def passes(self) -> int:
        return self.rehearsed.passes

    def observe(self, tokens: Sequence[int]) -> None:
        self.remembering.observe(tokens)
        self.rehearsed.observe(tokens)


def _propose(pool: DraftPool, wants: Sequence[tuple[HybridDrafter, int, int]]) -> list[list[int]]:
    """Memory costs nothing, so only the draft's passes are limited."""
    drafts = [drafter.remembering.propose(k) for drafter, k, _ in wants]
    for drafter, _, _ in wants:
        drafter.part, drafter.confidence = REMEMBERED, drafter.remembering.confidence
    silent = [i for i, draft in enumerate(drafts) if not draft]
    made = propose_together(pool, [(wants[i][0].drafting, *wants[i][1:]) for i in silent])
    for i, draft in zip(silent, made, strict=True):
        drafter = wants[i][0]
        drafts[i], drafter.part, drafter.confidence = draft, DRAFTED, drafter.drafting.confidence
    return drafts


def load(num_speculative_tokens: int, settings: Mapping[str, Any], files: Mapping[str, bytes]) -> HybridProposer:
    wanted = {SHAPE_FILE, WEIGHTS_FILE, MEMORY_FILE}
    if set(files) != wanted:
        raise PolicyError(f"A hybrid policy has the files {sorted(wanted)} beside its manifest; got {sorted(files)}.")
    values = read_settings(ProposerKind.HYBRID, settings, DEFAULTS)
    own = {name: values[name] for name in neural.DEFAULTS}
    remembered = {name: values[name] for name in memory.DEFAULTS}
    return HybridProposer(
        num_speculative_tokens,
        TraceMemoryProposer(num_speculative_tokens, TraceMemory.parse(files[MEMORY_FILE]), **remembered),
        unpack(files),
        **own,
    )
