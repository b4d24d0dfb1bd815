"""The padded passes of CUDA, on a CPU in float64: the same tokens as passes laid out anew, whatever stands beside."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from engine.model.batch import Row, build_batch
from engine.model.graphs import uncaptured
from engine.model.kv_cache import KVCache
from engine.model.llama import Llama
from engine.model.loading import Target
from engine.model.padded import WIDTHS, Bucket, PaddedRows
from engine.model.random_weights import TINY, random_llama
from engine.runner.captured_pass import CapturedPass
from engine.runner.engine import Engine, RequestResult
from engine.runner.profile import ROWS, profile_step_costs
from engine.speculation.proposer import Proposer
from engine.speculation.verify import accepted_counts, draw_tokens, sample, target_probabilities, verify_greedy
from tests.model.tape import NotCapturable, Tape
from tests.runner.driving import (
    MEMORY,
    NGRAM,
    NONE,
    Scripted,
    alone,
    engine_of,
    memory_of,
    plain_answers,
    request,
    run,
    run_at_random,
)
from tests.runner.test_exactness import FOOL, mixed_requests, prompts

LONG = 90


@pytest.fixture(scope="module")
def proposers(tiny: Target) -> dict[int, Proposer]:
    vocab = tiny.config.vocab_size
    plain = plain_answers(tiny, prompts(tiny, 6), 40)
    return {
        MEMORY: memory_of(plain),
        FOOL: Scripted(lambda tokens, k: [(tokens[-1] * 7 + i) % vocab for i in range(k)]),
    }


def captured(target: Target, proposers: dict[int, Proposer], tape: Tape, **options: object) -> Engine:
    return engine_of(target, proposers, capture_on=lambda device: tape, **options)


def graphs_of(engine: Engine) -> CapturedPass:
    assert isinstance(engine.runner.target_pass, CapturedPass)
    return engine.runner.target_pass


@pytest.mark.parametrize("seed", range(4))
def test_captured_steps_give_what_a_request_gets_alone(tiny: Target, proposers: dict[int, Proposer], seed: int) -> None:
    """Random joins, leaves, policies, sampling, ragged K, slots left empty in between, prompts in chunks beside."""
    wanted = mixed_requests(tiny, 14, seed)
    tape = Tape()
    engine = captured(tiny, proposers, tape, max_num_seqs=5, prefill_chunk=16)
    results, cancelled = run_at_random(engine, wanted, random.Random(seed))
    for want in wanted:
        if want.request_id not in cancelled:
            single = alone(tiny, want, proposers)
            assert (results[want.request_id].payload, results[want.request_id].counts) == (
                single.payload,
                single.counts,
            )
    assert engine.step_errors == engine.draft_errors == 0
    assert tape.captures == len(graphs_of(engine).graphs), "each bucket is captured once"
    assert tape.replays > 3 * tape.captures > 0


def test_a_preempted_request_says_what_it_says_alone(tiny: Target, proposers: dict[int, Proposer]) -> None:
    wanted = [
        request(f"r{i}", p, version, max_tokens=LONG, **({"temperature": 0.8, "seed": i} if i % 2 else {}))
        for i, (p, version) in enumerate(zip(prompts(tiny, 5, 9), (NONE, NGRAM, MEMORY, FOOL, NGRAM), strict=True))
    ]
    engine = captured(tiny, proposers, Tape(), max_num_seqs=5, prefill_chunk=16, kv_tokens=256)
    results, _ = run_at_random(engine, wanted, random.Random(0))
    assert engine.scheduler.preemptions > 0
    for name, result in results.items():
        want = next(w for w in wanted if w.request_id == name)
        assert result.payload.output_ids == alone(tiny, want, proposers).payload.output_ids


def test_a_swap_of_policies_captures_nothing_again(tiny: Target, proposers: dict[int, Proposer]) -> None:
    tape = Tape()
    engine = captured(tiny, proposers, tape)
    for round_ in range(3):
        for i, p in enumerate(prompts(tiny, 4)):
            engine.add(request(f"{round_}-{i}", p, FOOL, max_tokens=12, ignore_eos=True))
        run(engine)
        if round_ == 0:
            seen = tape.captures
            engine.unload(FOOL)
            engine.load(FOOL, proposers[FOOL])
    assert tape.captures == seen > 0


def test_what_was_prepared_is_not_captured_when_requests_come(tiny: Target, proposers: dict[int, Proposer]) -> None:
    tape = Tape()
    engine = captured(tiny, proposers, tape)
    graphs_of(engine).prepare(4)
    prepared = tape.captures
    assert prepared == 3 * 3, "1, 2 and 4 rows of 1, 3 and 5 tokens over at most 160 keys"
    for i, p in enumerate(prompts(tiny, 6)):
        engine.add(request(str(i), p, FOOL if i % 2 else NGRAM, max_tokens=20))
    run(engine)
    assert tape.captures == prepared < tape.replays


MAX_LEN = 600


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_llama(replace(TINY, max_position=1024), seed=1)


def filled(model: Llama) -> KVCache:
    """Four slots full of keys and values, as of requests that run."""
    cache = KVCache(model.config, 4, MAX_LEN, model.dtype)
    generator = torch.Generator().manual_seed(5)
    for layer in (*cache.flat_keys, *cache.flat_values):
        layer.copy_(torch.randn(layer.shape, generator=generator, dtype=layer.dtype))
    return cache


def rows_of(bucket: Bucket, rng: random.Random) -> list[Row]:
    """A row for some of the slots, the last one among them, each with some of the tokens, one with all."""
    slots = [slot for slot in range(bucket.rows - 1) if rng.random() < 0.7] + [bucket.rows - 1]
    counts = [rng.randint(1, bucket.width) for _ in slots]
    counts[rng.randrange(len(counts))] = bucket.width
    ends = [rng.randint(count, bucket.length) for count in counts]
    return [
        Row(slot, end - count, [rng.randrange(TINY.vocab_size) for _ in range(count)])
        for slot, count, end in zip(slots, counts, ends, strict=True)
    ]


def hidden_of(model: Llama, cache: KVCache, bucket: Bucket, rows: list[Row], make: type[PaddedRows]) -> torch.Tensor:
    """What a captured pass says of all tokens of ``rows``, one row after the other; before it another one ran."""
    padded = make(cache, model.config.group_size, model.dtype, model.device)
    out = torch.zeros(bucket.tokens, model.config.hidden_size, dtype=model.dtype)
    padded.park(bucket)
    replay = Tape()(lambda: out.copy_(model.forward(padded.batch(bucket), cache)))
    longest = [Row(slot, bucket.length - bucket.width, [1] * bucket.width) for slot in range(bucket.rows)]
    before = [t.clone() for t in (*cache.flat_keys, *cache.flat_values)]
    padded.fill(bucket, longest)  # leaves its tokens, positions, places and counts behind, and nothing else
    for was, now in zip(before, (*cache.flat_keys, *cache.flat_values), strict=True):
        now.copy_(was)
    padded.fill(bucket, rows)
    replay()
    width = bucket.width
    return torch.cat([out[row.slot * width :][: len(row.token_ids)] for row in rows])


def untouched(cache: KVCache, before: KVCache, rows: list[Row]) -> bool:
    """Whether nothing but the places of ``rows``, and the place that is nobody's, was written."""
    own = torch.ones(cache.flat_keys[0].shape[0], dtype=torch.bool)
    own[cache.nowhere] = False
    for row in rows:
        own[row.slot * cache.max_len + row.start : row.slot * cache.max_len + row.end] = False
    pairs = zip((*cache.flat_keys, *cache.flat_values), (*before.flat_keys, *before.flat_values), strict=True)
    return all(torch.equal(now[own], was[own]) for now, was in pairs)


BUCKETS = [Bucket(rows, width, length) for rows in (1, 2, 4) for width in WIDTHS for length in (256, 512, MAX_LEN)]


def agrees(model: Llama, bucket: Bucket, seed: int, make: type[PaddedRows] = PaddedRows) -> bool:
    rows = rows_of(bucket, random.Random(seed))
    cache, eager = filled(model), filled(model)
    got = hidden_of(model, cache, bucket, rows, make)
    batch = build_batch(rows, [], MAX_LEN, model.config.group_size, model.dtype, model.device)
    want = model.forward(batch, eager)
    return torch.allclose(got, want, rtol=1e-9, atol=1e-9) and untouched(cache, filled(model), rows)


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_every_bucket_says_what_a_pass_of_its_tokens_says(model: Llama, bucket: Bucket) -> None:
    assert agrees(model, bucket, 0)


class WritesIntoSlotZero(PaddedRows):
    """A planted fault: padding is written to the first place of the first slot."""

    def fill(self, bucket: Bucket, rows: list[Row]) -> None:  # type: ignore[override]
        super().fill(bucket, rows)
        places = self._inputs.device[2 * bucket.tokens : 3 * bucket.tokens]
        places[places == self._cache.nowhere] = 0


class StaleLengths(PaddedRows):
    """A planted fault: places without a token keep what the last step left in them."""

    def fill(self, bucket: Bucket, rows: list[Row]) -> None:  # type: ignore[override]
        last = self._inputs.device.clone()
        super().fill(bucket, rows)
        n, width = bucket.tokens, bucket.width
        for row in {*range(bucket.rows)} - {row.slot for row in rows}:
            for part in range(3):
                own = slice(part * n + row * width, part * n + (row + 1) * width)
                self._inputs.device[own] = last[own]


class OneKeyLess(PaddedRows):
    """A planted fault: positions lag by one, so each token is blind to itself."""

    def fill(self, bucket: Bucket, rows: list[Row]) -> None:  # type: ignore[override]
        super().fill(bucket, rows)
        positions = self._inputs.device[bucket.tokens : 2 * bucket.tokens]
        positions.sub_(1).clamp_(min=0)


@pytest.mark.parametrize("fault", [WritesIntoSlotZero, StaleLengths, OneKeyLess])
def test_planted_faults_of_padding_are_seen(model: Llama, fault: type[PaddedRows]) -> None:
    found = [agrees(model, Bucket(4, width, 256), seed, fault) for width in (1, 3) for seed in range(4)]
    assert not all(found)


def test_a_bucket_is_the_smallest_that_fits_and_too_much_is_refused(model: Llama) -> None:
    padded = PaddedRows(filled(model), 2, model.dtype, model.device)
    assert padded.bucket([Row(2, 254, [1, 2]), Row(0, 10, [1])]) == Bucket(4, 3, 256)
    assert padded.bucket([Row(0, 10, [1])], beyond=247) == Bucket(1, 1, 512)
    assert padded.bucket([Row(0, MAX_LEN - 1, [1])], beyond=8).length == MAX_LEN
    with pytest.raises(Exception, match="No captured pass has 5 rows of 1 tokens over 7 keys"):
        padded.bucket_of(5, 1, 7)


def tape_of(body: Callable[[], object]) -> None:
    Tape()(body)


def test_the_stand_in_is_as_strict_as_a_graph() -> None:
    """It replays operations, not Python, on the storage it saw; and refuses what a capture cannot hold."""
    x, out, factor = torch.arange(4.0), torch.zeros(4), 2
    weights = [torch.ones(4)]

    def body() -> None:
        out.copy_(x * factor + weights[0])

    replay = Tape()(body)
    x.fill_(10.0)
    factor = 3
    weights[0].fill_(5.0)
    replay()
    assert out.tolist() == [25.0] * 4, "storage is read again, a number of Python is not"
    weights[0] = torch.zeros(4)
    replay()
    assert out.tolist() == [25.0] * 4, "a tensor put in place of another is not seen"
    for waiting in (lambda: x.sum().item(), lambda: x[x > 1], lambda: torch.nonzero(x)):
        with pytest.raises(NotCapturable):
            tape_of(waiting)


def test_counts_on_the_device_are_those_of_verify() -> None:
    rng = random.Random(0)
    for width in (1, 3, 5):
        counts = [rng.randint(0, width) for _ in range(40)]
        tokens = [[rng.randrange(2) for _ in range(width)] for _ in counts]
        choices = [[rng.randrange(2) for _ in range(width)] for _ in counts]
        got = accepted_counts(torch.tensor(choices), torch.tensor(tokens), torch.tensor(counts)).tolist()
        for accepted, row, chosen, count in zip(got, tokens, choices, counts, strict=True):
            if count:
                assert accepted == verify_greedy(chosen[:count], row[1:count]).accepted
            else:
                assert accepted == 0


def test_tokens_drawn_on_the_device_are_those_drawn_on_the_host() -> None:
    generator = torch.Generator().manual_seed(0)
    rng = random.Random(1)
    n, vocab = 300, 50
    logits = 3 * torch.randn(n, vocab, generator=generator, dtype=torch.float64)
    settings = [
        (rng.choice([1e-7, 0.3, 0.7, 1.0, 2.0]), rng.choice([0, 1, 5, vocab]), rng.choice([1e-6, 0.3, 0.9, 1.0]))
        for _ in range(n)
    ]
    uniforms = [rng.choice([0.0, rng.random(), 1 - 2**-53]) for _ in range(n)]
    heat, top_k, top_p = zip(*settings, strict=True)
    double = torch.float64
    got = draw_tokens(
        logits,
        torch.tensor(heat, dtype=double),
        torch.tensor(top_k),
        torch.tensor(top_p, dtype=double),
        torch.tensor(uniforms, dtype=double),
    )
    for i, (temperature, k, p) in enumerate(settings):
        weights = target_probabilities(logits[i : i + 1], temperature, k, p)[0]
        assert int(got[i]) == sample(weights, uniforms[i]), (settings[i], uniforms[i])


def test_profiling_touches_no_request(tiny: Target, proposers: dict[int, Proposer]) -> None:
    engine = engine_of(tiny, proposers, capture_on=lambda device: uncaptured)
    wanted = request("x", prompts(tiny, 1)[0], NGRAM, max_tokens=30)
    engine.add(wanted)
    outputs = [*engine.step(), *engine.step()]
    trial = engine.runner.target_pass.trial(100, 64)
    for count in (1, 4, 16, 64):
        trial(count)
    while engine.has_work:
        outputs += engine.step()
    result: RequestResult | None = outputs[-1].result
    assert result is not None
    assert result.payload.output_ids == alone(tiny, wanted).payload.output_ids


def test_an_engine_for_one_request_is_profiled_as_far_as_its_passes_go(tiny: Target) -> None:
    runner = engine_of(tiny, max_num_seqs=1, capture_on=lambda device: uncaptured).runner
    assert runner.target_pass.most_rows == WIDTHS[-1]
    assert sorted(profile_step_costs(runner, budget_s=1e6)) == [n for n in sorted(ROWS) if n <= WIDTHS[-1]]
