"""The target's word on a response: nothing on what the engine serves, the very place of a token that is not its own."""

from __future__ import annotations

import pytest

from engine.contracts import TracePayload
from engine.model.kv_cache import KVCache
from engine.model.loading import Target
from engine.runner.rescoring import Rescoring
from tests.runner.driving import MEMORY, NGRAM, NONE, alone, memory_of, request

PROMPT = (5, 9, 5, 9, 5, 9, 30, 31)


def scratch(target: Target) -> KVCache:
    return KVCache(target.config, 1, 160, target.model.dtype)


def rescored(target: Target, payload: TracePayload, piece: int, tie: float | None = None) -> Rescoring:
    seen = Rescoring(target.model, scratch(target), payload.prompt_ids, payload.output_ids, tie)
    while not seen.is_done:
        assert 0 < seen.advance(piece) <= piece
    return seen


@pytest.mark.parametrize("version", [NONE, NGRAM, MEMORY])
@pytest.mark.parametrize("piece", [1, 3, 8, 64])
def test_what_was_served_is_the_targets_own(tiny: Target, version: int, piece: int) -> None:
    extra = {MEMORY: memory_of([alone(tiny, request("a", PROMPT))])}
    served = alone(tiny, request("r", PROMPT, version), extra)
    assert version == NONE or served.counts.accepted
    seen = rescored(tiny, served.payload, piece)
    assert (seen.checked, seen.ties, seen.mismatch) == (len(served.payload.output_ids), 0, None)


@pytest.mark.parametrize("place", [0, 1, 9, 23])
@pytest.mark.parametrize("piece", [1, 8])
def test_a_wrong_token_is_found_where_it_stands(tiny: Target, place: int, piece: int) -> None:
    payload = alone(tiny, request("r", PROMPT)).payload
    wrong = list(payload.output_ids)
    wrong[place] = (wrong[place] + 7) % 256
    seen = rescored(tiny, TracePayload(payload.prompt_ids, tuple(wrong), ()), piece)
    found = seen.mismatch
    assert found is not None
    assert (found.position, found.served, found.target) == (place, wrong[place], payload.output_ids[place])
    assert found.gap > seen.tie
    assert seen.checked == place


def test_a_tie_is_counted_and_what_follows_it_is_still_judged(tiny: Target) -> None:
    payload = alone(tiny, request("r", PROMPT)).payload
    wrong = list(payload.output_ids)
    wrong[4] = (wrong[4] + 7) % 256
    first = rescored(tiny, TracePayload(payload.prompt_ids, tuple(wrong), ()), 8)
    assert first.mismatch is not None
    seen = rescored(tiny, TracePayload(payload.prompt_ids, tuple(wrong), ()), 8, tie=first.mismatch.gap + 1e-6)
    assert seen.ties >= 1
    assert seen.checked > 4
