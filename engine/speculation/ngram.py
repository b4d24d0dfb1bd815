"""Prompt lookup: what followed the same n tokens earlier in this request (Saxena 2023, as in vLLM's ngram).

The index knows where each token occurred, and where the last ``max_n`` tokens did: a committed token costs two entries.
A copy is found by the second whatever the length of the context; a shorter match is measured backwards from the places
of the last token, the newest of them. Entries are made when a match is asked for: where drafting does not pay, tokens
are committed far more often than that.
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
MOST_PLACES = 64
"""Occurrences of a token from which matches of fewer than ``max_n`` tokens are measured, the newest: the comma of a
long text must not cost more than its pass."""
DEFAULTS: dict[str, int | float] = {"min_n": 2, "max_n": 4}


class ContextIndex:
    """The tokens of one request so far, and the places behind each token and behind the last of ``max_n`` tokens."""

    def __init__(self, tokens: Sequence[int], min_n: int, max_n: int) -> None:
        self.tokens = list(tokens)
        self.behind: dict[int, list[int]] = {}
        self.behind_longest: dict[tuple[int, ...], int] = {}
        self.min_n, self.max_n = min_n, max_n
        self._entered = 1  # places below it; a token enters when another follows, so the end never finds itself

    def extend(self, tokens: Sequence[int]) -> None:
        self.tokens.extend(tokens)

    def _enter(self) -> None:
        """What was committed since a match was last asked for."""
        context, most = self.tokens, self.max_n
        for at in range(self._entered, len(context)):
            self.behind.setdefault(context[at - 1], []).append(at)
            if at >= most:
                self.behind_longest[tuple(context[at - most : at])] = at
        self._entered = max(1, len(context))

    def longest_match(self, window: Sequence[int]) -> tuple[int, int]:
        """(n, token): what followed the last n tokens of ``window`` when they occurred before, n as large as can be and
        at most ``max_n``, the latest of equals; (0, 0) where it is less than ``min_n``. A match of fewer than ``max_n``
        is one of the last ``MOST_PLACES`` occurrences of the last token."""
        if not window:
            return 0, 0
        self._enter()
        context, best, place = self.tokens, 0, 0
        most = min(self.max_n, len(window))
        if most == self.max_n and (at := self.behind_longest.get(tuple(window[-most:]))) is not None:
            return most, context[at]
        for at in self.behind.get(window[-1], ())[: -MOST_PLACES - 1 : -1]:
            n = 1
            while n < most and n < at and context[at - 1 - n] == window[-1 - n]:
                n += 1
            if n > best:
                best, place = n, at
                if n == most:
                    break
        return (best, context[place]) if best >= self.min_n else (0, 0)


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
            n, token = index.longest_match(window)
            if not n:
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
