"""The neural draft in the engine: exact whatever it says, alone or in company, and worth what it is worth."""

from __future__ import annotations

import random
from typing import Any

import pytest

from engine.contracts import SpecCounts
from engine.model.loading import Target
from engine.runner import runner
from engine.runner.engine import RequestResult
from engine.speculation.control import Choice, KController, learn_worth
from engine.speculation.draft_pool import DraftPool
from engine.speculation.hybrid import HybridProposer, RehearsedHybrid
from engine.speculation.neural_file import DraftFile
from engine.speculation.proposer import Proposer
from engine.speculation.replay import replay, replay_controlled
from engine.speculation.step_costs import StepCosts
from tests.runner.drafts import CopyPool, DreamingPool, LatePool, neural, random_draft, trained_draft
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
from tests.runner.test_exactness import prompts

WILD, TRAINED, HYBRID, FOOL = 5, 6, 7, 8
LONG = 40


@pytest.fixture(scope="module")
def plain(tiny: Target) -> list[RequestResult]:
    return plain_answers(tiny, prompts(tiny, 10), LONG)


@pytest.fixture(scope="module")
def trained(tiny: Target, plain: list[RequestResult]) -> DraftFile:
    return trained_draft(tiny, plain[:6], 100)


@pytest.fixture(scope="module")
def proposers(tiny: Target, plain: list[RequestResult], trained: DraftFile) -> dict[int, Proposer]:
    vocab = tiny.config.vocab_size
    return {
        WILD: neural(random_draft(tiny)),
        TRAINED: neural(trained, min_survival=0.01),
        MEMORY: memory_of(plain[::2]),
        HYBRID: HybridProposer(4, memory_of(plain[::2]), trained, 0.0),
        FOOL: Scripted(lambda tokens, k: [(tokens[-1] * 7 + i) % vocab for i in range(k)]),
    }


@pytest.mark.parametrize("version", [WILD, TRAINED, HYBRID])
def test_greedy_equals_plain_decoding_bit_for_bit(
    tiny: Target, plain: list[RequestResult], proposers: dict[int, Proposer], version: int
) -> None:
    counts = SpecCounts()
    for want in plain:
        got = alone(tiny, request("x", want.payload.prompt_ids, version, max_tokens=LONG), proposers)
        assert got.payload.output_ids == want.payload.output_ids
        assert got.draft_errors == 0
        counts.drafted += got.counts.drafted
        counts.accepted += got.counts.accepted
    assert counts.drafted > counts.accepted  # something was rejected, or this proved little
    assert counts.accepted > (0 if version == WILD else 50)


@pytest.mark.parametrize("seed", range(3))
def test_a_row_does_not_depend_on_its_neighbours(tiny: Target, proposers: dict[int, Proposer], seed: int) -> None:
    """Joins, leaves, six policies and sampling, prompts in chunks: every survivor gets what it gets alone."""
    rng = random.Random(seed)
    wanted = []
    for i, prompt in enumerate(prompts(tiny, 14, seed + 50)):
        sampled = {"temperature": 0.8, "top_p": 0.95, "seed": i} if rng.random() < 0.4 else {}
        version = rng.choice([NONE, NGRAM, MEMORY, WILD, TRAINED, TRAINED, HYBRID, HYBRID, FOOL])
        wanted.append(request(f"r{i}", prompt, version, max_tokens=rng.randint(1, 30), **sampled))
    engine = engine_of(tiny, proposers, max_num_seqs=5, prefill_chunk=16)
    results, cancelled = run_at_random(engine, wanted, rng)
    for want in wanted:
        if want.request_id not in cancelled:
            got, single = results[want.request_id], alone(tiny, want, proposers)
            assert got.payload == single.payload, want
            assert (got.counts, got.draft_errors) == (single.counts, 0)


def test_a_draft_that_copies_the_target_is_accepted_whole(
    tiny: Target, plain: list[RequestResult], trained: DraftFile
) -> None:
    """Positions, slots, keys and values: one place out of line anywhere, and something is rejected."""
    copy = {WILD: neural(trained, CopyPool)}
    for want in plain:
        counts = alone(tiny, request("x", want.payload.prompt_ids, WILD, max_tokens=LONG), copy).counts
        assert counts.accepted == counts.drafted
        assert counts.drafted_per_pos == [8, 8, 8, 7]  # 39 tokens after the first, five a step, the last step four
    engine = engine_of(tiny, copy, prefill_chunk=7)
    for i, want in enumerate(plain):
        engine.add(request(str(i), want.payload.prompt_ids, WILD, max_tokens=LONG))
    for result in run(engine).values():
        assert result.counts.accepted == result.counts.drafted == 31


def accepted(tiny: Target, plain: list[RequestResult], draft: DraftFile, make: type[DraftPool]) -> float:
    counts = [
        alone(tiny, request("x", p.payload.prompt_ids, WILD, max_tokens=LONG), {WILD: neural(draft, make)}).counts
        for p in plain[:6]
    ]
    return 1 + sum(c.accepted for c in counts) / sum(c.steps for c in counts)


def test_a_trained_draft_is_worth_what_training_says_and_faults_show(
    tiny: Target, plain: list[RequestResult], trained: DraftFile
) -> None:
    """Outputs are right whatever the draft does, so its acceptance is pinned: planted misalignments lower it."""
    sound = accepted(tiny, plain, trained, DraftPool)
    assert sound > 2.0
    assert accepted(tiny, plain, trained, LatePool) < 0.8 * sound
    assert accepted(tiny, plain, trained, DreamingPool) < 0.97 * sound


@pytest.mark.parametrize("version", [WILD, TRAINED, HYBRID])
def test_replay_counts_what_the_runner_counts(
    tiny: Target, plain: list[RequestResult], proposers: dict[int, Proposer], version: int
) -> None:
    """Chains from all places at once against drafting step by step with keys and values in a cache."""
    bound = engine_of(tiny, proposers)._proposers[version]
    for i, want in enumerate(plain[:5]):
        limit = (LONG, 7)[i % 2]
        result = alone(tiny, request("x", want.payload.prompt_ids, version, max_tokens=limit), proposers)
        ids = result.payload.prompt_ids, result.payload.output_ids
        for given in (limit, None):  # without a limit drafts reach past the end, and only more is drafted
            counts = replay(bound, "chat", *ids, max_tokens=given)
            if given is not None:
                assert counts == result.counts, i
            assert (counts.steps, counts.accepted) >= (result.counts.steps, result.counts.accepted)


class Known(StepCosts):
    """Costs that stay what they were said to be."""

    def observe(self, rows: int, seconds: float) -> None:
        return


@pytest.mark.parametrize("pass_s", [0.001, 0.02, 1.0])
@pytest.mark.parametrize("version", [WILD, TRAINED, HYBRID])
def test_replay_under_k_control_asks_for_what_the_engine_asks_for(
    tiny: Target,
    plain: list[RequestResult],
    proposers: dict[int, Proposer],
    version: int,
    pass_s: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a clock that only passes of the draft move: cheap ones, dear ones, and ones that never pay."""
    passes, costs = [0], {1: 0.023, 2: 0.024, 4: 0.032, 8: 0.051}
    forward = DraftPool._forward

    def counted(*args: Any) -> Any:
        passes[0] += 1
        return forward(*args)

    def learn(rows: Any, spoke: Any, choice: Choice, accepted: Any, took: float) -> None:
        learn_worth(rows, spoke, choice, accepted, choice.pass_s)  # the target's take no time on this clock

    monkeypatch.setattr(DraftPool, "_forward", counted)
    monkeypatch.setattr(runner, "learn_worth", learn)
    engine = engine_of(tiny, proposers, clock=lambda: passes[0] * pass_s)
    engine.control.costs = Known(costs)
    controller = KController(Known(costs))
    for i, want in enumerate(plain[:5]):
        engine.add(request(str(i), want.payload.prompt_ids, version, max_tokens=LONG))
        result = run(engine)[str(i)]
        ids = result.payload.prompt_ids, result.payload.output_ids
        counts, _ = replay_controlled(
            engine._proposers[version], controller, version, "chat", *ids, LONG, draft_pass_s=pass_s
        )
        assert counts == result.counts, i


def test_a_dear_draft_does_not_silence_the_memory_beside_it(
    tiny: Target, plain: list[RequestResult], proposers: dict[int, Proposer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes of the draft never pay here; what memory knows costs nothing and is proposed all the same."""
    bound = engine_of(tiny, proposers)._proposers

    def accepted(version: int) -> int:
        controller = KController(Known({1: 0.023, 2: 0.024, 4: 0.032, 8: 0.051}))
        return sum(
            replay_controlled(
                bound[version], controller, version, "chat", p.payload.prompt_ids, p.payload.output_ids, LONG, 1.0
            )[0].accepted
            for p in plain
        )

    alone = accepted(MEMORY)
    assert accepted(HYBRID) > 0.9 * alone > 0
    propose = RehearsedHybrid.propose

    def limited(self: RehearsedHybrid, k: int, limit: int | None = None) -> list[int]:
        return propose(self, k if limit is None else min(k, limit), limit)

    monkeypatch.setattr(RehearsedHybrid, "propose", limited)  # the fault: the draft's price limits memory too
    assert accepted(HYBRID) < 0.5 * alone


def test_places_are_given_back(tiny: Target, proposers: dict[int, Proposer]) -> None:
    engine = engine_of(tiny, proposers, max_num_seqs=2)
    bound = engine._proposers[WILD]
    for i in range(5):
        engine.add(request(str(i), [1, 2, 3 + i], WILD))
    outputs = engine.step()
    assert bound.in_use == 2  # type: ignore[attr-defined]
    cancelled = engine.cancel("0")
    assert cancelled is not None
    assert bound.in_use == 1  # type: ignore[attr-defined]
    engine.unload(WILD)
    run(engine, [*outputs, cancelled])
    assert bound.in_use == 0  # type: ignore[attr-defined]


def test_a_preempted_request_hears_all_again(
    tiny: Target, plain: list[RequestResult], proposers: dict[int, Proposer]
) -> None:
    """The cache holds two of three; places of the draft are as scarce as slots."""
    engine = engine_of(tiny, proposers, max_num_seqs=3, kv_tokens=128, prefill_chunk=16)
    for i, want in enumerate(plain[:8]):
        version = (TRAINED, HYBRID)[i % 2]
        engine.add(request(str(i), want.payload.prompt_ids, version, max_tokens=LONG))
    results = run(engine)
    assert engine.scheduler.preemptions > 0
    for i, want in enumerate(plain[:8]):
        single = alone(
            tiny, request("x", want.payload.prompt_ids, (TRAINED, HYBRID)[i % 2], max_tokens=LONG), proposers
        )
        assert results[str(i)].payload.output_ids == want.payload.output_ids
        assert (results[str(i)].counts, results[str(i)].draft_errors) == (single.counts, 0)


def test_a_failing_draft_costs_its_request_the_draft_only(
    tiny: Target, plain: list[RequestResult], trained: DraftFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny, {WILD: neural(trained)})
    for i, want in enumerate(plain[:3]):
        engine.add(request(str(i), want.payload.prompt_ids, WILD, max_tokens=LONG))
    outputs = [output for _ in range(3) for output in engine.step()]
    state = engine._lives["1"].drafter.state  # type: ignore[union-attr]
    state.tokens.append(0)  # its own state is broken
    results = run(engine, outputs)
    for i, want in enumerate(plain[:3]):
        assert results[str(i)].payload.output_ids == want.payload.output_ids
        assert results[str(i)].draft_errors == (1 if i == 1 else 0)
    assert results["0"].counts.accepted > 20
