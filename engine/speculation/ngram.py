"""Prompt lookup: what followed the same n tokens earlier in this request (Saxena 2023, as in vLLM's ngram).

The index is a dict from the last n tokens to the position after their latest earlier occurrence. A committed token
costs one insertion per n, a drafted token at most one lookup per n, whatever the length of the context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.contracts import ProposerKind
from engine.speculation.acceptance import DEFAULT_CONTROL, ControlSettings
from engine.speculation.proposer import Drafter, PolicyError, no_files, read_settings

EXACTLY = {1: 0.23, 2: 0.54, 3: 0.64, 4: 0.70, 5: 0.77}
AT_LEAST = {1: 0.52, 2: 0.75, 3: 0.82, 4: 0.85, 5: 0.88, 6: 0.89}
"""How often a token drafted from the request's own context was right, by the length of the longest match. Measured by
replay on 400 responses of SmolLM2-135M. Where K control begins; it learns the rest."""
DEFAULTS: dict[str, int | float] = {"min_n": 2, "max_n": 4}


class ContextIndex:
    """The tokens of one request so far, and where each of their n-grams was last continued."""

    def __init__(self, tokens: Sequence[int], min_n: int, max_n: int) -> None:
        self.tokens: list[int] = []
        self.follows: dict[tuple[int, ...], int] = {}
        self.min_n, self.max_n = min_n, max_n
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        context, follows = self.tokens, self.follows
        for token in tokens:
            position = len(context)
            # An n-gram enters with the token that follows it, so the tail of the context never finds itself.
            for n in range(self.min_n, min(self.max_n, position) + 1):
                follows[tuple(context[position - n :])] = position
            context.append(token)

    def next_after(self, tail: tuple[int, ...]) -> int | None:
        """The token that followed ``tail`` the last time, if there was one."""
        position = self.follows.get(tail)
        return None if position is None else self.tokens[position]


def match_confidence(n: int, max_n: int) -> float:
    """That a token which followed these n tokens before follows them again; at ``max_n`` the match may be longer."""
    table = AT_LEAST if n >= max_n else EXACTLY
    return table[min(n, max(table))]


class NgramDrafter:
    def __init__(self, prompt_ids: Sequence[int], min_n: int, max_n: int) -> None:
        self.index = ContextIndex(prompt_ids, min_n, max_n)
        self.confidence: list[float] = []

    def propose(self, k: int) -> list[int]:
        index, draft, self.confidence = self.index, list[int](), []
        window = index.tokens[-index.max_n :]  # the last tokens of context + draft
        while len(draft) < k:
            for n in range(min(index.max_n, len(window)), index.min_n - 1, -1):
                token = index.next_after(tuple(window[-n:]))
                if token is not None:
                    break
            else:
                break
            draft.append(token)
            self.confidence.append(match_confidence(n, index.max_n))
            window.append(token)
        return draft

    def observe(self, tokens: Sequence[int]) -> None:
        self.index.extend(tokens)


@dataclass(frozen=True, slots=True)
class NgramProposer:
    num_speculative_tokens: int
    min_n: int = 2
    max_n: int = 4
    control: ControlSettings = DEFAULT_CONTROL
    kind: ProposerKind = ProposerKind.NGRAM

    def __post_init__(self) -> None:
        if not 1 <= self.min_n <= self.max_n:
            raise PolicyError(f"An ngram policy needs 1 <= min_n <= max_n, got {self.min_n} and {self.max_n}.")

    def start(self, prompt_ids: Sequence[int], traffic_class: str) -> Drafter:
        return NgramDrafter(prompt_ids, self.min_n, self.max_n)


def load(num_speculative_tokens: int, settings: Mapping[str, Any], files: Mapping[str, bytes]) -> NgramProposer:
    no_files(ProposerKind.NGRAM, files)
    return NgramProposer(num_speculative_tokens, **read_settings(ProposerKind.NGRAM, settings, DEFAULTS))
