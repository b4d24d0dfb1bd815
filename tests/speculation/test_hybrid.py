"""Who speaks in a hybrid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from engine.speculation.hybrid import DRAFTED, REMEMBERED, Turns
from engine.speculation.memory import TraceMemoryDrafter
from engine.speculation.proposer import Said


class Told:
    """A memory that says what it is told to; ``asked``: (k, tokens before, the probability that all are accepted)."""

    def __init__(self, tokens: Sequence[int], confidence: Sequence[float], behind: Sequence[int] = ()) -> None:
        self.tokens, self.first, self.behind = list(tokens), list(confidence), list(behind)
        self.confidence: list[float] = []
        self.asked: list[tuple[int, list[int], float]] = []

    def propose(self, k: int, after: Sequence[int] = (), survival: float = 1.0) -> list[int]:
        self.asked.append((k, list(after), survival))
        found = (self.behind if after else self.tokens)[:k]
        self.confidence = ([0.5] * len(found)) if after else self.first[:k]
        return found


def turns(memory: Told) -> Turns:
    return Turns(cast(TraceMemoryDrafter, memory))


def test_memory_that_is_sure_speaks_and_no_pass_is_made() -> None:
    both = turns(Told([1, 2], [0.9, 0.5]))
    assert not both.remember(8, 8)
    assert both.speak(8, None) == [1, 2]
    assert (both.part, both.confidence) == (REMEMBERED, [0.9, 0.5])
    assert both.said == [Said(REMEMBERED, 8, [1, 2], [0.9, 0.5])]


def test_where_memory_is_unsure_the_one_that_promises_more_speaks_and_both_are_judged() -> None:
    remembered = Said(REMEMBERED, 8, [1, 2], [0.3, 0.9])  # 0.3 + 0.27 tokens
    for chance, part, tokens in ((0.56, REMEMBERED, [1, 2]), (0.58, DRAFTED, [5])):
        both, drafted = turns(Told([1, 2], [0.3, 0.9])), Said(DRAFTED, 4, [5], [chance])
        assert both.remember(8, 4)
        assert both.speak(8, drafted) == tokens
        assert (both.part, both.said) == (part, [remembered, drafted])


def test_a_draft_that_may_not_be_asked_leaves_the_word_to_memory() -> None:
    both = turns(Told([1], [0.1]))
    assert not both.remember(8, 0)
    assert both.speak(8, None) == [1]
    silent = turns(Told([], []))
    assert not silent.remember(8, 0)
    assert (silent.speak(8, None), silent.said) == ([], [])


def test_memory_goes_on_behind_the_draft_and_is_not_judged_for_it() -> None:
    memory = Told([], [], behind=[7, 8, 9])
    both, drafted = turns(memory), Said(DRAFTED, 2, [5, 6], [0.8, 0.5])
    assert both.remember(4, 2)
    assert both.speak(4, drafted) == [5, 6, 7, 8]
    assert memory.asked[-1] == (2, [5, 6], pytest.approx(0.4))
    assert (both.part, list(both.confidence), both.said) == (DRAFTED, [0.8, 0.5, 0.5, 0.5], [drafted])


def test_a_draft_that_says_nothing_has_been_asked_all_the_same() -> None:
    both, drafted = turns(Told([1], [0.2])), Said(DRAFTED, 3, [])
    assert both.remember(4, 3)
    assert both.speak(4, drafted) == [1]
    assert drafted in both.said, "its passes are paid for, and it learns that it fell silent"
