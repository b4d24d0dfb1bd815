from __future__ import annotations

import random

import pytest

from engine.contracts import SlipstreamError
from engine.speculation.ngram import MOST_PLACES, ContextIndex, NgramProposer, load
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


def test_the_longest_match_is_the_one_that_a_search_of_everything_finds() -> None:
    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.randrange(rng.choice((2, 3, 8))) for _ in range(rng.randrange(MOST_PLACES))]
        min_n, after = rng.choice((1, 2)), [rng.randrange(3) for _ in range(rng.randrange(3))]
        max_n = min_n + rng.randrange(4)
        window = [*tokens[-max_n:], *after][-max_n:]

        def follows(n: int) -> list[int]:
            return [tokens[at] for at in range(n, len(tokens)) if tokens[at - n : at] == window[-n:]]  # noqa: B023

        found = [(n, follows(n)[-1]) for n in range(min(max_n, len(window)), min_n - 1, -1) if follows(n)]
        assert ContextIndex(tokens, min_n, max_n).longest_match(window) == (found[0] if found else (0, 0))


def test_a_copy_is_found_however_far_back_it_lies() -> None:
    """The planted fault: among the last occurrences of a common token only, copies of long prompts broke off."""
    rng = random.Random(1)
    copied = [0 if at % 2 else rng.randrange(1, 1_000) for at in range(60)]  # every other token is a comma
    between = [0 if at % 2 else rng.randrange(1_000, 2_000) for at in range(4 * MOST_PLACES)]
    index = ContextIndex([*copied, *between, *copied[:4]], 1, 4)
    for at in range(4, 60):
        assert index.longest_match(index.tokens[-4:]) == (4, copied[at])
        index.extend(copied[at : at + 1])


def test_a_token_costs_two_entries_and_a_common_one_no_long_search() -> None:
    index = ContextIndex(range(60), 1, 4)
    assert index.longest_match([5]) == (1, 6)
    index.extend(range(60, 100))
    assert not index.behind.get(60)  # nobody has asked
    assert index.longest_match([70]) == (1, 71)
    assert (sum(map(len, index.behind.values())), len(index.behind_longest)) == (99, 96)
    tokens = [7, 1, 5, *[0, 1] * MOST_PLACES, 7, 1]
    assert ContextIndex(tokens, 1, 4).longest_match([7, 1]) == (1, 7), "the only match of two lies too far back"
    assert ContextIndex(tokens[:3] + tokens[5:], 1, 4).longest_match([7, 1]) == (2, 5)


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
