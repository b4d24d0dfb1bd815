"""What is drafted changes how fast a response comes and never what it is."""

from __future__ import annotations

import random

import pytest

from engine.model.loading import Target
from engine.runner.engine import EngineRequest, RequestResult
from engine.speculation.proposer import Proposer
from engine.speculation.replay import replay
from engine.speculation.step_costs import StepCosts
from tests.runner.driving import (
    MEMORY,
    NGRAM,
    NONE,
    Scripted,
    alone,
    engine_of,
    memory_of,
    oracle,
    plain_answers,
    request,
    run,
    run_at_random,
)

ORACLE, FOOL = 4, 5


def prompts(target: Target, count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(3, target.config.vocab_size), k=rng.randint(3, 40)) for _ in range(count)]


@pytest.fixture(scope="module")
def plain(tiny: Target) -> list[RequestResult]:
    return plain_answers(tiny, prompts(tiny, 12), 40)


@pytest.fixture(scope="module")
def proposers(tiny: Target, plain: list[RequestResult]) -> dict[int, Proposer]:
    known = {r.payload.prompt_ids: r.payload.output_ids for r in plain}
    vocab = tiny.config.vocab_size
    return {
        MEMORY: memory_of(plain[::2]),
        ORACLE: oracle(known),
        FOOL: Scripted(lambda tokens, k: [(tokens[-1] * 7 + i) % vocab for i in range(k)]),
    }


@pytest.mark.parametrize("version", [NGRAM, MEMORY, ORACLE, FOOL])
def test_greedy_equals_plain_decoding_bit_for_bit(
    tiny: Target, plain: list[RequestResult], proposers: dict[int, Proposer], version: int
) -> None:
    for want in plain:
        got = alone(tiny, request("x", want.payload.prompt_ids, version, max_tokens=40), proposers)
        assert got.payload.output_ids == want.payload.output_ids
        assert got.text == want.text


def test_a_draft_like_the_target_is_accepted_whole(
    tiny: Target, plain: list[RequestResult], proposers: dict[int, Proposer]
) -> None:
    for want in plain:
        counts = alone(tiny, request("x", want.payload.prompt_ids, ORACLE, max_tokens=40), proposers).counts
        assert counts.accepted == counts.drafted
        assert counts.steps == 8  # 39 tokens after the first, five a step, the last step four
        assert counts.drafted_per_pos == [8, 8, 8, 7]


def test_the_policies_do_draft(tiny: Target, plain: list[RequestResult], proposers: dict[int, Proposer]) -> None:
    """An exactness test passes trivially when nothing is drafted or nothing rejected: pin both."""
    for version in (NGRAM, MEMORY):
        counts = [
            alone(tiny, request("x", p.payload.prompt_ids, version, max_tokens=40), proposers).counts for p in plain
        ]
        assert sum(c.accepted for c in counts) > 30
        assert sum(c.drafted - c.accepted for c in counts) > 5


def mixed_requests(target: Target, count: int, seed: int) -> list[EngineRequest]:
    rng = random.Random(seed)
    made = []
    for i, prompt in enumerate(prompts(target, count, seed)):
        sampled = {"temperature": 0.8, "top_p": 0.95, "seed": i} if rng.random() < 0.4 else {}
        version = rng.choice([NONE, NGRAM, MEMORY, FOOL])
        made.append(request(f"r{i}", prompt, version, max_tokens=rng.randint(1, 30), **sampled))
    return made


FREE, DEAR = {1: 1.0, 40: 1.1}, {1: 1.0, 2: 1.05, 3: 2.0, 40: 50.0}


@pytest.mark.parametrize("costs", [None, FREE, DEAR], ids=["whole drafts", "free rows", "dear rows"])
@pytest.mark.parametrize("seed", range(4))
def test_a_row_does_not_depend_on_its_neighbours(
    tiny: Target, proposers: dict[int, Proposer], seed: int, costs: dict[int, float] | None
) -> None:
    """Random joins, leaves, policies, sampling and K: every survivor gets what it gets alone."""
    wanted = mixed_requests(tiny, 14, seed)
    engine = engine_of(tiny, proposers, max_num_seqs=5, prefill_chunk=16)
    engine.control.costs = StepCosts(costs) if costs else None
    cut = 0  # drafted tokens that K control spared
    results, cancelled = run_at_random(engine, wanted, random.Random(seed))
    for want in wanted:
        if want.request_id not in cancelled:
            got, single = results[want.request_id], alone(tiny, want, proposers)
            assert got.payload.output_ids == single.payload.output_ids, want
            if costs is None:
                assert (got.payload, got.counts) == (single.payload, single.counts)
            else:
                cut += single.counts.drafted - got.counts.drafted
    assert cut > 0 if costs is DEAR else cut >= 0


@pytest.mark.parametrize("costs", [None, DEAR], ids=["whole drafts", "dear rows"])
def test_a_preempted_request_says_what_it_says_alone(
    tiny: Target, proposers: dict[int, Proposer], costs: dict[int, float] | None
) -> None:
    """The cache holds about two of five long requests: they take turns, and nobody can tell from the tokens."""
    wanted = [
        request(f"r{i}", p, version, max_tokens=90, **({"temperature": 0.8, "seed": i} if i % 2 else {}))
        for i, (p, version) in enumerate(zip(prompts(tiny, 5, 9), (NONE, NGRAM, MEMORY, FOOL, NGRAM), strict=True))
    ]
    engine = engine_of(tiny, proposers, max_num_seqs=5, prefill_chunk=16, kv_tokens=256)
    engine.control.costs = StepCosts(costs) if costs else None
    for want in wanted:
        engine.add(want)
    results = run(engine)
    assert engine.stats()["preemptions"] == sum(result.preemptions for result in results.values()) >= 2
    assert engine.stats()["kv_blocks"] == 0
    for want in wanted:
        got = results[want.request_id]
        assert got.payload.output_ids == alone(tiny, want, proposers).payload.output_ids
        assert got.ttft_s is not None
        assert got.queue_s is not None
        assert got.queue_s < got.ttft_s


@pytest.mark.parametrize("version", [MEMORY, FOOL])
def test_sampled_tokens_do_not_depend_on_what_is_drafted(
    tiny: Target, plain: list[RequestResult], proposers: dict[int, Proposer], version: int
) -> None:
    total = 0
    for seed, want in enumerate(plain):
        sampling = {"temperature": 0.7, "top_p": 0.9, "seed": seed, "max_tokens": 40}
        single = alone(tiny, request("x", want.payload.prompt_ids, NONE, **sampling))
        drafted = alone(tiny, request("x", want.payload.prompt_ids, version, **sampling), proposers)
        assert drafted.payload.output_ids == single.payload.output_ids
        total += drafted.counts.drafted
    assert total > 0


def test_sampled_rows_follow_their_seed(tiny: Target) -> None:
    prompt = prompts(tiny, 1)[0]
    sampled = [alone(tiny, request("x", prompt, NGRAM, temperature=1.0, seed=s)).payload for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_sampling_at_almost_zero_temperature_is_greedy(tiny: Target, plain: list[RequestResult]) -> None:
    for want in plain[:4]:
        got = alone(tiny, request("x", want.payload.prompt_ids, NGRAM, max_tokens=40, temperature=1e-6, seed=0))
        assert got.payload.output_ids == want.payload.output_ids


@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
def test_chunked_prefill_is_prefill(tiny: Target, plain: list[RequestResult], chunk: int) -> None:
    engine = engine_of(tiny, prefill_chunk=chunk)
    for i, want in enumerate(plain[:6]):
        engine.add(request(str(i), want.payload.prompt_ids, NGRAM, max_tokens=40))
    results = run(engine)
    for i, want in enumerate(plain[:6]):
        assert results[str(i)].payload.output_ids == want.payload.output_ids


@pytest.mark.parametrize("version", [NONE, NGRAM, MEMORY, ORACLE, FOOL])
def test_replay_counts_what_the_runner_counts(
    tiny: Target, plain: list[RequestResult], proposers: dict[int, Proposer], version: int
) -> None:
    engine = engine_of(tiny, proposers)
    for i, want in enumerate(plain):
        for name, limit in (("long", 40), ("short", 7)):
            result = alone(tiny, request("x", want.payload.prompt_ids, version, max_tokens=limit), proposers)
            counts = replay(
                engine._proposers[version],
                "chat",
                result.payload.prompt_ids,
                result.payload.output_ids,
                max_tokens=limit,
            )
            assert counts == result.counts, (i, name)
