from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save

from engine.contracts import SlipstreamError
from engine.speculation.memory import MEMORY_FILE, Lookup, TraceMemory, TraceMemoryProposer, load
from engine.speculation.memory_build import _hash_columns, ngram_hash
from tests.trace_memory import TraceMemoryBuilder


def built(*responses: tuple[str, list[int], list[int]], max_bytes: int = 100_000) -> bytes:
    builder = TraceMemoryBuilder()
    for traffic_class, prompt, output in responses:
        builder.add(traffic_class, prompt, output)
    return builder.build(max_bytes)


def proposer(data: bytes, min_confidence: float = 0.0, k: int = 4) -> TraceMemoryProposer:
    return TraceMemoryProposer(k, TraceMemory.parse(data), min_confidence=min_confidence)


def random_responses(count: int = 30, seed: int = 0) -> list[tuple[str, list[int], list[int]]]:
    rng = random.Random(seed)
    return [
        (rng.choice(["chat", "code"]), rng.choices(range(20), k=6), rng.choices(range(20), k=40)) for _ in range(count)
    ]


def test_drafts_what_a_past_response_said_from_its_first_token_on() -> None:
    data = built(("chat", [1, 2, 3], [10, 11, 12, 13]))
    drafter = proposer(data).start([8, 2, 3], "chat")
    assert drafter.propose(4) == [10, 11, 12, 13]
    assert proposer(data).start([8, 2, 3], "code").propose(4) == []


def test_prompts_are_context_and_never_learned_as_output() -> None:
    data = built(("chat", [1, 2, 3, 4], [9]))
    assert proposer(data).start([1, 2], "chat").propose(1) == []


def test_own_context_wins_at_equal_length_and_the_longer_match_over_both() -> None:
    data = built(("chat", [], [1, 2, 30]), ("chat", [], [5, 1, 2, 31]))
    assert proposer(data).start([1, 2, 40, 1, 2], "chat").propose(1) == [40]
    assert proposer(data).start([1, 2, 40, 5, 1, 2], "chat").propose(1) == [31]


def test_a_draft_ends_where_its_acceptance_becomes_unlikely() -> None:
    data = built(("chat", [], [1, 2, 3, 4, 5, 6]))  # n-grams of 2, 3 and 4, seen once each
    drafter = proposer(data).start([9, 1, 2], "chat")
    drafter.propose(4)
    first, second = 1 / 7, (1 + 6 / 7) / 7
    assert drafter.confidence[:2] == pytest.approx([first, second])
    limits = (first + 0.01, first - 0.01, first * second - 0.01, 0.0)
    assert [len(proposer(data, c).start([9, 1, 2], "chat").propose(4)) for c in limits] == [0, 1, 2, 4]


def test_most_frequent_token_and_its_confidence() -> None:
    memory = TraceMemory.parse(built(*[("chat", [], [1, 2, 3])] * 3, ("chat", [], [1, 2, 4]))).lookup("chat", 1)
    assert memory.next_after((1, 2)) == memory.next_after((1, 2)) == (3, 3 / (4 + 6))
    assert memory.next_after((2, 1)) is memory.next_after((2, 1)) is None


def test_shorter_matches_are_the_prior_of_longer_ones() -> None:
    """One sighting after (0, 1, 2) that says what (1, 2) mostly led to is worth more than one that says another."""
    common = [("chat", [], [1, 2, 3])] * 6
    usual, other = (
        TraceMemory.parse(built(*common, ("chat", [0, 1, 2], [token]))).lookup("chat", 1) for token in (3, 4)
    )
    assert usual.next_after((0, 1, 2)) == (3, pytest.approx((1 + 6 * 7 / (7 + 6)) / (1 + 6)))
    assert other.next_after((0, 1, 2)) == (4, pytest.approx((1 + 6 * 0) / (1 + 6)))


def test_memory_goes_on_behind_tokens_that_another_drafted() -> None:
    data = built(("chat", [], [1, 2, 3, 4, 5, 6]))
    behind, alone = (proposer(data).start([9, 1], "chat") for _ in range(2))
    alone.observe([2])
    assert behind.propose(3, after=[2]) == alone.propose(3) == [3, 4, 5]
    assert behind.confidence == alone.confidence
    assert proposer(data, 0.1).start([9, 1], "chat").propose(3, after=[2], survival=0.5) == []  # 0.5 / 7
    assert behind.propose(3) == []  # its own context did not grow


def test_what_is_remembered_of_a_table_is_bounded_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.speculation.memory.MOST_KNOWN", 50)
    memory, fresh = (TraceMemory.parse(built(*random_responses())) for _ in range(2))
    rng, lookup = random.Random(0), memory.lookup("chat", 1)
    for _ in range(500):
        tail = (rng.randrange(20), rng.randrange(20))
        assert lookup.next_after(tail) == Lookup(fresh.lookup("chat", 1).tables, 1).next_after(tail)
        assert len(lookup._known) <= 50
    made_up = {id(memory.lookup(f"made up {n}", 1)) for n in range(5)}
    assert len(made_up) == 1  # clients name classes: one that nobody taught holds nothing of its own


def test_counts_agree_with_counting_by_hand() -> None:
    responses = random_responses()
    seen: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for traffic_class, prompt, output in responses:
        tokens = prompt + output
        for at in range(len(prompt), len(tokens)):
            for n in (2, 3, 4):
                seen.setdefault((traffic_class, tuple(tokens[at - n : at])), []).append(tokens[at])
    memory = TraceMemory.parse(built(*responses))
    for (traffic_class, key), nexts in seen.items():
        best = min(set(nexts), key=lambda token: (-nexts.count(token), token))
        table = memory.classes[traffic_class]
        assert table.find(ngram_hash(key)) == (best, nexts.count(best), len(nexts))


def test_same_bytes_in_any_order_and_never_more_than_allowed() -> None:
    responses = random_responses()
    data = built(*responses)
    random.Random(1).shuffle(responses)
    assert built(*responses) == data
    for max_bytes in (2_000, 8_000, 20_000):
        assert len(built(*responses, max_bytes=max_bytes)) <= max_bytes
    counts = [
        sorted((c for table in TraceMemory.parse(d).classes.values() for c in table.count), reverse=True)
        for d in (data, built(*responses, max_bytes=4_000))
    ]
    assert 0 < len(counts[1]) < len(counts[0])
    assert counts[1] == counts[0][: len(counts[1])]  # what was seen least often is left out


def test_vectorised_hash_is_the_scalar_one() -> None:
    grams = np.random.default_rng(0).integers(0, 50_000, (3, 100)).astype(np.uint64)
    assert [ngram_hash(column.tolist()) for column in grams.T] == _hash_columns(list(grams)).tolist()


def test_no_two_short_ngrams_share_a_hash() -> None:
    grams = [g for n in (2, 3, 4) for g in itertools.product(range(12), repeat=n)]
    assert len({ngram_hash(gram) for gram in grams}) == len(grams)


def test_an_empty_memory_is_a_memory() -> None:
    assert TraceMemory.parse(TraceMemoryBuilder().build(1_000)).classes == {}


def test_broken_files_are_refused_by_name() -> None:
    arrays = load_arrays(built(("chat", [], [1, 2, 3, 4])))

    def refused(message: str, **changes: np.ndarray) -> None:
        with pytest.raises(SlipstreamError, match=message):
            TraceMemory.parse(save({**arrays, **{f"chat/{name}": array for name, array in changes.items()}}))

    refused("int64", token=arrays["chat/token"].astype(np.int64))
    refused("count is", count=arrays["chat/count"][1:])
    refused("strictly increasing", key=np.ascontiguousarray(arrays["chat/key"][::-1]))
    refused("between 1", count=arrays["chat/count"] + np.uint32(9))
    refused("unknown tensor", weight=arrays["chat/key"])
    with pytest.raises(SlipstreamError, match="lacks"):
        TraceMemory.parse(save({"chat/key": arrays["chat/key"]}))
    with pytest.raises(SlipstreamError, match="not a safetensors"):
        TraceMemory.parse(b"\x80\x04pickle")
    with pytest.raises(SlipstreamError, match="one file"):
        load(4, {}, {})
    with pytest.raises(SlipstreamError, match="max_n"):
        load(4, {"max_n": 9}, {MEMORY_FILE: save(arrays)})
