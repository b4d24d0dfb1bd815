"""Memory and neural draft together. Memory costs nothing and learns from the first requests; the neural draft costs a
pass per token and generalises.

Memory is asked first, and speaks alone where its first token is sure enough. Else the draft is asked too, and the one
that promises more accepted tokens speaks; behind the draft's last token memory goes on, which takes no pass. While
memory speaks, the draft's slots wait, and are caught up with in the first pass of its next turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul
from typing import TYPE_CHECKING, Any

from engine.contracts import ProposerKind
from engine.speculation import memory, neural
from engine.speculation.acceptance import DEFAULT_CONTROL, ControlSettings
from engine.speculation.memory import MEMORY_FILE, TraceMemory, TraceMemoryDrafter, TraceMemoryProposer
from engine.speculation.neural import NeuralDrafter, check_survival, propose_together
from engine.speculation.neural_file import SHAPE_FILE, WEIGHTS_FILE, DraftFile, unpack
from engine.speculation.proposer import PolicyError, Said, read_settings, unbound
from engine.speculation.rehearsal import RehearsedDrafter, Rehearsing, rehearse

if TYPE_CHECKING:
    from torch import Tensor

    from engine.speculation.draft_pool import DraftPool
    from engine.speculation.draft_pools import DraftPools

REMEMBERED, DRAFTED = 0, 1
"""The parts of a hybrid, in the order in which they are asked."""
SURE = 0.4
"""Of its first token memory must be so sure to speak unasked. It lies between what the request's own context is worth
after one token and after two; a good draft's first token is right in half of all cases (docs/log.md)."""
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


class Turns:
    """Who is asked and who speaks; the same in serving and over a stored response. ``said``: what both answered."""

    def __init__(self, remembering: TraceMemoryDrafter) -> None:
        self.remembering = remembering
        self.confidence: Sequence[float] = ()
        self.part = REMEMBERED
        self.said: list[Said] = []

    def remember(self, k: int, limit: int) -> bool:
        """Ask memory for ``k`` tokens; whether the draft is to be asked as well, for ``limit``."""
        tokens = self.remembering.propose(k)
        self.said = [Said(REMEMBERED, k, tokens, self.remembering.confidence)] if tokens else []
        return limit > 0 and not (tokens and self.remembering.confidence[0] >= SURE)

    def speak(self, k: int, drafted: Said | None) -> list[int]:
        """The proposal of at most ``k`` tokens, once the draft has answered or was not asked (None)."""
        remembered = self.said[0] if self.said else None
        if drafted is not None:
            self.said.append(drafted)
        if remembered is not None and (drafted is None or promised(remembered) > promised(drafted)):
            self.part, self.confidence = REMEMBERED, remembered.confidence
            return list(remembered.tokens)
        self.part, self.confidence = DRAFTED, ()
        if drafted is None or not drafted.tokens:
            return []
        more = self.remembering.propose(k - len(drafted.tokens), drafted.tokens, prod(drafted.confidence))
        self.confidence = [*drafted.confidence, *self.remembering.confidence]
        return [*drafted.tokens, *more]


def promised(said: Said) -> float:
    """Expected number of accepted tokens by the drafter's own confidence."""
    return sum(accumulate(said.confidence, mul))


class HybridDrafter(Turns):
    def __init__(self, remembering: TraceMemoryDrafter, drafting: NeuralDrafter) -> None:
        super().__init__(remembering)
        self.drafting = drafting

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

    def skip(self, drafter: HybridDrafter, position: int) -> None:
        self.pool.skip(drafter.drafting.state, position)

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


class RehearsedHybrid(Turns):
    """A hybrid's drafter over a stored response (``rehearsal``)."""

    def __init__(self, remembering: TraceMemoryDrafter, rehearsed: RehearsedDrafter) -> None:
        super().__init__(remembering)
        self.rehearsed = rehearsed

    def propose(self, k: int, limit: int | None = None) -> list[int]:
        limit = k if limit is None else min(k, limit)
        if not self.remember(k, limit):
            return self.speak(k, None)
        tokens = self.rehearsed.propose(limit)
        return self.speak(k, Said(DRAFTED, limit, tokens, self.rehearsed.confidence))

    @property
    def passes(self) -> int:
        return self.rehearsed.passes

    def observe(self, tokens: Sequence[int]) -> None:
        self.remembering.observe(tokens)
        self.rehearsed.observe(tokens)


def _propose(pool: DraftPool, wants: Sequence[tuple[HybridDrafter, int, int]]) -> list[list[int]]:
    """Memory costs nothing, so only the draft's passes are limited."""
    asked = [(drafter, min(k, limit)) for drafter, k, limit in wants if drafter.remember(k, min(k, limit))]
    made = propose_together(pool, [(drafter.drafting, limit, limit) for drafter, limit in asked])
    drafted = {
        id(drafter): Said(DRAFTED, limit, tokens, drafter.drafting.confidence)
        for (drafter, limit), tokens in zip(asked, made, strict=True)
    }
    return [drafter.speak(k, drafted.get(id(drafter))) for drafter, k, _ in wants]


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
