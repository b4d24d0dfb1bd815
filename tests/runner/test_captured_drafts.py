"""Drafting in captured passes, on a CPU in float64: the drafts of ``DraftPool``, and no graph twice."""

from __future__ import annotations

import random

import pytest

from engine.model.loading import Target
from engine.model.padded import Bucket
from engine.runner.captured_pass import CapturedPass
from engine.runner.engine import Engine, RequestResult
from engine.speculation.captured_pool import CapturedPool
from engine.speculation.hybrid import HybridProposer
from engine.speculation.neural import NeuralProposer
from engine.speculation.neural_file import DraftFile
from engine.speculation.proposer import HiddenReader, Proposer
from tests.model.tape import Tape
from tests.runner.drafts import random_draft, trained_draft
from tests.runner.driving import (
    MEMORY,
    NGRAM,
    NONE,
    alone,
    engine_of,
    memory_of,
    plain_answers,
    request,
    run,
    run_at_random,
)
from tests.runner.test_exactness import prompts

WILD, TRAINED, HYBRID, NEXT = 5, 6, 7, 8
LONG = 40


@pytest.fixture(scope="module")
def plain(tiny: Target) -> list[RequestResult]:
    return plain_answers(tiny, prompts(tiny, 8), LONG)


@pytest.fixture(scope="module")
def trained(tiny: Target, plain: list[RequestResult]) -> DraftFile:
    return trained_draft(tiny, plain[:5], 80)


@pytest.fixture(scope="module")
def proposers(tiny: Target, plain: list[RequestResult], trained: DraftFile) -> dict[int, Proposer]:
    return {
        WILD: NeuralProposer(4, random_draft(tiny), 0.0),
        TRAINED: NeuralProposer(6, trained, 0.05),
        MEMORY: memory_of(plain[::2]),
        HYBRID: HybridProposer(4, memory_of(plain[::2]), trained, 0.0),
    }


def captured(tiny: Target, proposers: dict[int, Proposer], tape: Tape, **options: object) -> Engine:
    return engine_of(tiny, proposers, capture_on=lambda device: tape, **options)


def pool_of(engine: Engine, version: int) -> CapturedPool:
    bound = engine._proposers[version]
    assert isinstance(bound, HiddenReader)
    assert isinstance(bound.pool, CapturedPool)
    return bound.pool


@pytest.mark.parametrize("seed", range(3))
def test_captured_drafts_are_those_a_request_gets_alone(
    tiny: Target, proposers: dict[int, Proposer], seed: int
) -> None:
    """Every proposal and every count: mixed policies, ragged K, chains that end at different lengths, sampling."""
    rng = random.Random(seed)
    wanted = []
    for i, prompt in enumerate(prompts(tiny, 12, seed + 50)):
        sampled = {"temperature": 0.8, "top_p": 0.95, "seed": i} if rng.random() < 0.4 else {}
        version = rng.choice([NONE, NGRAM, MEMORY, WILD, TRAINED, TRAINED, HYBRID, HYBRID])
        wanted.append(request(f"r{i}", prompt, version, max_tokens=rng.randint(1, 30), **sampled))
    engine = captured(tiny, proposers, Tape(), max_num_seqs=5, prefill_chunk=16)
    results, cancelled = run_at_random(engine, wanted, rng)
    for want in wanted:
        if want.request_id not in cancelled:
            got, single = results[want.request_id], alone(tiny, want, proposers)
            assert (got.payload, got.counts, got.draft_errors) == (single.payload, single.counts, 0), want
    assert sum(len(pool_of(engine, version).graphs) for version in (WILD, TRAINED, HYBRID)) > 2


def serve(engine: Engine, version: int, name: str, seed: int = 0) -> list[RequestResult]:
    for i, prompt in enumerate(prompts(engine.target, 3, seed)):
        engine.add(request(f"{name}{i}", prompt, version, max_tokens=LONG))
    return list(run(engine).values())


def test_a_new_version_drafts_in_the_graphs_of_one_that_left(
    tiny: Target, proposers: dict[int, Proposer], trained: DraftFile
) -> None:
    tape = Tape()
    engine = captured(tiny, {WILD: NeuralProposer(4, random_draft(tiny, 128), 0.0)}, tape)
    pool, seen = pool_of(engine, WILD), tape.captures
    assert seen > 0, "while nobody is served, loading a policy captures what it will need"
    serve(engine, WILD, "a")
    engine.unload(WILD)
    engine.load(NEXT, NeuralProposer(4, trained, 0.0))
    assert pool_of(engine, NEXT) is pool
    results = serve(engine, NEXT, "b")
    assert len(pool.graphs) == 3 * 5 + 3, "1, 2 and 4 rows, 1 to 17 slots that wait, and a token each"
    target_pass = engine.runner.target_pass
    assert isinstance(target_pass, CapturedPass)
    assert tape.captures == len(target_pass.graphs) + len(pool.graphs)
    want = {NEXT: NeuralProposer(4, trained, 0.0)}
    for result in results:
        single = alone(tiny, request("x", result.payload.prompt_ids, NEXT, max_tokens=LONG), want)
        assert (result.payload, result.counts) == (single.payload, single.counts)
    assert sum(r.counts.accepted for r in results) > 20, "it drafts by the weights that it was given"


def test_a_pool_is_not_given_on_while_a_request_may_draft_in_it(tiny: Target, trained: DraftFile) -> None:
    """Running and waiting requests keep the version they began with; another shape never takes its place."""
    engine = captured(tiny, {WILD: NeuralProposer(4, random_draft(tiny, 128), 0.0)}, Tape(), max_num_seqs=1)
    for i, prompt in enumerate(prompts(tiny, 2)):
        engine.add(request(str(i), prompt, WILD, max_tokens=12))
    outputs = [*engine.step(), *engine.step()]
    pool = pool_of(engine, WILD)
    engine.unload(WILD)
    engine.load(NEXT, NeuralProposer(4, trained, 0.0))
    assert pool_of(engine, NEXT) is not pool
    results = run(engine, outputs)
    for i, prompt in enumerate(prompts(tiny, 2)):
        single = alone(
            tiny, request("x", prompt, WILD, max_tokens=12), {WILD: NeuralProposer(4, random_draft(tiny, 128), 0.0)}
        )
        assert results[str(i)].counts == single.counts
    engine.load(9, NeuralProposer(4, random_draft(tiny, 64), 0.0))
    assert pool_of(engine, 9) is not pool, "another shape"
    engine.load(10, NeuralProposer(4, trained, 0.0))
    assert pool_of(engine, 10) is pool


class ForgetsLimits(CapturedPool):
    """A planted fault: a chain writes on beyond what its request may have, into the places of the next one."""

    def _go_on(self, bucket: Bucket) -> None:
        self._limits.device.fill_(100)
        super()._go_on(bucket)


class StaysInPlace(CapturedPool):
    """A planted fault: all drafted tokens of a chain stand at one position."""

    def _go_on(self, bucket: Bucket) -> None:
        self._position.sub_(1)
        super()._go_on(bucket)


@pytest.mark.parametrize("fault", [ForgetsLimits, StaysInPlace])
def test_planted_faults_are_seen(
    tiny: Target, proposers: dict[int, Proposer], fault: type[CapturedPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs are right whatever is drafted; the drafts and the pool's keys are not."""

    def drafts_and_keys() -> tuple[object, list[object]]:
        engine = captured(tiny, {WILD: proposers[WILD]}, Tape(), max_num_seqs=3, max_model_len=64)
        for i, (length, most) in enumerate(((40, 24), (6, 40), (5, 50))):
            engine.add(request(str(i), list(range(3, 3 + length)), WILD, max_tokens=most))
        counts = sorted((name, r.counts.accepted, r.payload.steps) for name, r in run(engine).items())
        return counts, [layer.sum().item() for layer in pool_of(engine, WILD).cache.keys]

    sound = drafts_and_keys()
    assert drafts_and_keys() == sound
    monkeypatch.setattr("engine.speculation.draft_pools.CapturedPool", fault)
    assert drafts_and_keys() != sound
