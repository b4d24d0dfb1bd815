"""What every proposer is, and the one place where kinds are listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from engine.contracts import ProposerKind, SlipstreamError, VerifyStep
from engine.speculation.acceptance import ControlSettings
from engine.speculation.control import RowControl

if TYPE_CHECKING:
    from torch import Tensor

    from engine.speculation.draft_pool import DraftPool
    from engine.speculation.draft_pools import DraftPools


class PolicyError(SlipstreamError):
    """A policy artifact that cannot be used: says which part of it and why."""


class Drafter(Protocol):
    """The drafting state of one request. Owned by that request; never shared.

    ``confidence`` belongs to the last proposal: for each token the probability, as the drafter sees it, that it is
    accepted when all before it are. Empty where a drafter has no opinion; K control then learns by position.
    """

    @property
    def confidence(self) -> Sequence[float]: ...

    def propose(self, k: int) -> list[int]:
        """Between 0 and ``k`` token ids that may follow what was observed. Deterministic: q is one-hot."""

    def observe(self, tokens: Sequence[int]) -> None:
        """The target committed these tokens."""


def checked(drafter: Drafter, k: int, tokens: list[int], vocab_size: int) -> list[int]:
    """``tokens``, which ``drafter`` proposed when asked for ``k``; ValueError where they cannot be verified."""
    if len(tokens) > k or not all(0 <= token < vocab_size for token in tokens):
        raise ValueError(f"proposed {tokens!r} for k = {k}, vocabulary {vocab_size}")
    if drafter.confidence and len(drafter.confidence) != len(tokens):
        raise ValueError(f"proposed {len(tokens)} tokens with {len(drafter.confidence)} confidences")
    if not all(0 <= chance <= 1 for chance in drafter.confidence):  # nor is it so of what is no number
        raise ValueError(f"proposed {tokens!r} with confidences {drafter.confidence!r}")
    return tokens


class Proposer(Protocol):
    """A resident policy: immutable, shared by all its requests."""

    @property
    def kind(self) -> ProposerKind: ...

    @property
    def num_speculative_tokens(self) -> int: ...

    @property
    def control(self) -> ControlSettings: ...

    def start(self, prompt_ids: Sequence[int], traffic_class: str) -> Drafter: ...


@runtime_checkable
class NeedsTarget(Protocol):
    """A policy that drafts from the target's hidden states: the engine binds it to its own target when it loads it."""

    def bind(self, pools: DraftPools) -> HiddenReader: ...


@dataclass(frozen=True, slots=True)
class Said:
    """What one ``part`` of a policy answered when it was asked for so many tokens, whether or not they were proposed:
    what comes to be committed teaches what its answers are worth."""

    part: int
    asked: int
    tokens: Sequence[int]
    confidence: Sequence[float] = ()


def asked_of(part: int, said: Sequence[Said]) -> int:
    """How many tokens were asked of this part."""
    return sum(one.asked for one in said if one.part == part)


def judge(
    rows: Sequence[RowControl],
    part: int,
    said: Sequence[Said],
    step: VerifyStep,
    confidence: Sequence[float],
    committed: Sequence[int],
) -> None:
    """After a step: the ``part`` that spoke answers for its promises, and all that were asked (``said``) learn from
    what the target committed. ``rows``: by part; ``confidence``: of the whole proposal."""
    for one in said:
        if one.part == part:
            rows[part].settle(step, len(one.tokens), confidence)
        rows[one.part].observe(one.asked, one.tokens, one.confidence, committed)


@runtime_checkable
class InTurn(Drafter, Protocol):
    """A drafter that asks several ``parts`` in turn, the last of which makes passes of a neural draft.

    ``part``: which of them made the last proposal, or its beginning; ``said``: what each that was asked answered.
    """

    @property
    def part(self) -> int: ...

    @property
    def said(self) -> Sequence[Said]: ...

    def propose(self, k: int, limit: int | None = None) -> list[int]:
        """At most ``k`` token ids, and at most ``limit`` that take passes."""


@runtime_checkable
class HiddenReader(Protocol):
    """A bound policy: a proposer whose requests are drafted for together. The runner hands it what the target said.

    ``aux_layers``: the layers whose outputs it reads. Its drafters come from ``start`` and hold a place in ``pool``
    until ``end``.
    """

    kind: ProposerKind
    num_speculative_tokens: int
    control: ControlSettings
    aux_layers: tuple[int, ...]
    pool: DraftPool
    parts: int
    """Drafters that a request of it asks in turn; only the last one makes passes."""

    def start(self, prompt_ids: Sequence[int], traffic_class: str) -> Any: ...

    def propose(self, wants: Sequence[tuple[Any, int, int]]) -> list[list[int]]:
        """A draft of at most k tokens for every (drafter, k, limit), at most limit <= k of which take passes; each is
        what the drafter would propose alone."""

    def feed(self, fed: Sequence[tuple[Any, int, Tensor]]) -> None:
        """(drafter, first position, aux states [n, len(aux_layers) * hidden]) of tokens that the request has."""

    def skip(self, drafter: Any, position: int) -> None:
        """It has missed states: the next to come are those from ``position`` on, and it drafts by them alone."""

    def end(self, drafter: Any) -> None: ...

    def rehearse(self, prompt_ids: Sequence[int], output_ids: Sequence[int], traffic_class: str) -> Drafter:
        """A drafter for the replay of a stored response, which needs no states: it has computed them."""

    @property
    def in_use(self) -> int:
        """Requests that hold a place."""


def parts(proposer: Proposer) -> int:
    """Drafters that a request of a policy asks in turn."""
    return proposer.parts if isinstance(proposer, HiddenReader) else 1


class Loader(Protocol):
    """Makes a proposer of a manifest's settings and the artifact's other files; refuses what it does not know."""

    def __call__(
        self, num_speculative_tokens: int, settings: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> Proposer: ...


def loaders() -> dict[ProposerKind, Loader]:
    """Kind → loader. A new proposer is one file and one line here."""
    from engine.speculation import hybrid, memory, neural, ngram, none

    return {
        ProposerKind.NONE: none.load,
        ProposerKind.NGRAM: ngram.load,
        ProposerKind.TRACE_MEMORY: memory.load,
        ProposerKind.NEURAL: neural.load,
        ProposerKind.HYBRID: hybrid.load,
    }


def read_settings(kind: ProposerKind, given: Mapping[str, Any], defaults: Mapping[str, int | float]) -> dict[str, Any]:
    """``given`` over ``defaults``; a key or a type that the defaults do not have is an error."""
    for key, value in given.items():
        if key not in defaults:
            raise PolicyError(f"A {kind} policy has no setting {key!r}; it knows {sorted(defaults) or 'none'}.")
        allowed = (int, float) if isinstance(defaults[key], float) else (int,)
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise PolicyError(
                f"Setting {key!r} of a {kind} policy must be a number like {defaults[key]}, got {value!r}."
            )
    return {**defaults, **given}


def unbound(kind: ProposerKind) -> PolicyError:
    return PolicyError(f"A {kind} policy drafts from a target's hidden states: bind it to a target before it starts.")


def no_files(kind: ProposerKind, files: Mapping[str, bytes]) -> None:
    if files:
        raise PolicyError(f"A {kind} policy has no files beside its manifest, got {sorted(files)}.")
