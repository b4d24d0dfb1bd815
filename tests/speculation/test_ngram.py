from __future__ import annotations

import pytest

from engine.contracts import SlipstreamError
from engine.speculation.ngram import ContextIndex, NgramProposer, load
from engine.speculation.none import NoneProposer


def test_drafts_what_followed_last_time() -> None:
    drafter = NgramProposer(4).start([1, 2, 3, 4, 5, 9, 1, 2], "chat")
    assert drafter.propose(3) == [3, 4, 5]
    assert drafter.propose(0) == []


def test_the_latest_occurrence_wins_and_the_longer_match_before_it() -> None:
    assert NgramProposer(4, max_n=2).start([1, 2, 3, 1, 2, 4, 1, 2], "chat").propose(1) == [4]
    assert NgramProposer(4).start([7, 1, 2, 3, 1, 2, 4, 7, 1, 2], "chat").propose(1) == [3]


def test_a_draft_continues_through_its_own_tokens() -> None:
    assert NgramProposer(4).start([5, 6, 5, 6, 5], "chat").propose(6) == [6, 5, 6, 5, 6, 5]


def test_nothing_is_drafted_without_a_match_and_observing_makes_one() -> None:
    drafter = NgramProposer(4).start([1, 2, 3], "chat")
    assert drafter.propose(4) == []
    drafter.observe([1, 2])
    assert drafter.propose(4) == [3, 1, 2, 3]


def test_index_costs_one_entry_per_n_and_token() -> None:
    index = ContextIndex(range(100), 2, 4)
    assert len(index.follows) == 98 + 97 + 96


def test_none_never_drafts() -> None:
    drafter = NoneProposer().start([1, 1, 1, 1], "chat")
    drafter.observe([1])
    assert drafter.propose(8) == []


def test_settings_are_strict() -> None:
    assert load(3, {"max_n": 3}, {}).max_n == 3
    for settings in ({"n": 3}, {"max_n": "3"}, {"max_n": True}, {"max_n": 1}, {"min_n": 0}):
        with pytest.raises(SlipstreamError):
            load(3, settings, {})
    with pytest.raises(SlipstreamError, match="no files"):
        load(3, {}, {"memory.safetensors": b""})
