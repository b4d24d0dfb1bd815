"""What every proposer is, and the one place where kinds are listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from engine.contracts import ProposerKind, SlipstreamError
from engine.speculation.control import ControlSettings


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


class Proposer(Protocol):
    """A resident policy: immutable, shared by all its requests."""

    @property
    def kind(self) -> ProposerKind: ...

    @property
    def num_speculative_tokens(self) -> int: ...

    @property
    def control(self) -> ControlSettings: ...

    def start(self, prompt_ids: Sequence[int], traffic_class: str) -> Drafter: ...


class Loader(Protocol):
    """Makes a proposer of a manifest's settings and the artifact's other files; refuses what it does not know."""

    def __call__(
        self, num_speculative_tokens: int, settings: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> Proposer: ...


def loaders() -> dict[ProposerKind, Loader]:
    """Kind → loader. A new proposer is one file and one line here."""
    from engine.speculation import memory, ngram, none

    return {
        ProposerKind.NONE: none.load,
        ProposerKind.NGRAM: ngram.load,
        ProposerKind.TRACE_MEMORY: memory.load,
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


def no_files(kind: ProposerKind, files: Mapping[str, bytes]) -> None:
    if files:
        raise PolicyError(f"A {kind} policy has no files beside its manifest, got {sorted(files)}.")
