"""Requests whose drafts do not pay: the target hands nothing out for them, and they can begin to listen at any time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from engine.model.kv_cache import KVCache
from engine.model.loading import Target
from engine.runner.engine import Engine, RequestResult
from engine.runner.rescoring import Prefill
from engine.speculation import listening
from engine.speculation.acceptance import Acceptance, ControlSettings
from engine.speculation.draft_pool import DraftPool, Want
from engine.speculation.hybrid import HybridProposer
from engine.speculation.listening import Audience, Listening
from engine.speculation.neural import NeuralProposer
from engine.speculation.neural_file import DraftFile
from engine.speculation.proposer import HiddenReader, Proposer
from engine.speculation.step_costs import StepCosts
from tests.model.tape import Tape
from tests.runner.drafts import trained_draft
from tests.runner.driving import NONE, alone, engine_of, memory_of, plain_answers, request, run, run_at_random
from tests.runner.test_exactness import prompts

NEURAL, HYBRID = 6, 7
LONG = 80


@pytest.fixture(scope="module")
def plain(tiny: Target) -> list[RequestResult]:
    return plain_answers(tiny, prompts(tiny, 8), LONG)


@pytest.fixture(scope="module")
def trained(tiny: Target, plain: list[RequestResult]) -> DraftFile:
    return trained_draft(tiny, plain[:5], 80)


@pytest.fixture(scope="module")
def proposers(plain: list[RequestResult], trained: DraftFile) -> dict[int, Proposer]:
    control = ControlSettings(probe_every=5, prior=0.9)
    return {
        NEURAL: NeuralProposer(4, trained, 0.0, control),
        HYBRID: HybridProposer(4, memory_of(plain[::2]), trained, 0.0, control),
    }


class Worth:
    """What K control believes of drafting, and the layers that each pass of the target was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pays, self.layers = False, list[tuple[int, ...]]()
        monkeypatch.setattr(Acceptance, "pays", lambda acceptance, requests, judged=0.0: self.pays)
        monkeypatch.setattr(listening, "SETTLED", 4)
        monkeypatch.setattr(listening, "WARM", 6)

    def engine(self, target: Target, proposers: dict[int, Proposer], **options: Any) -> Engine:
        """Its clock stands still: drafts cost nothing."""
        engine = engine_of(target, proposers, clock=lambda: 0.0, **options)
        engine.control.costs = StepCosts({1: 0.02, 64: 0.03})
        engine.runner.target_pass = Heard(engine.runner.target_pass, self.layers)
        return engine

    @property
    def handed(self) -> int:
        """Passes that handed states out."""
        return sum(map(bool, self.layers))


class Heard:
    def __init__(self, target_pass: Any, layers: list[tuple[int, ...]]) -> None:
        self._pass, self._layers = target_pass, layers

    def __call__(self, scheduled: Any, drafts: Any, lives: Any, layers: Sequence[int]) -> Any:
        self._layers.append(tuple(layers))
        return self._pass(scheduled, drafts, lives, layers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pass, name)


@pytest.fixture
def worth(monkeypatch: pytest.MonkeyPatch) -> Worth:
    return Worth(monkeypatch)


def serve(engine: Engine, plain: Sequence[RequestResult], version: int) -> list[RequestResult]:
    for i, want in enumerate(plain):
        engine.add(request(str(i), want.payload.prompt_ids, version, max_tokens=LONG))
    results = run(engine)
    for i, want in enumerate(plain):
        assert results[str(i)].payload.output_ids == want.payload.output_ids
        assert results[str(i)].draft_errors == 0
    return [results[str(i)] for i in range(len(plain))]


@pytest.mark.parametrize("version", [NEURAL, HYBRID])
def test_states_are_handed_out_only_while_somebody_listens(
    tiny: Target,
    plain: list[RequestResult],
    proposers: dict[int, Proposer],
    worth: Worth,
    version: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fed, feed = list[int](), DraftPool.feed
    monkeypatch.setattr(DraftPool, "feed", lambda self, given: (fed.append(len(given)), feed(self, given))[1])
    serve(worth.engine(tiny, proposers), plain, version)
    assert worth.handed == len(fed) == 0 < len(worth.layers)
    monkeypatch.setattr(Listening, "begin", lambda self, wanted: None)  # the fault: prompts are listened to in any case
    serve(worth.engine(tiny, proposers), plain, version)
    assert worth.handed == len(fed) > 0


def test_a_sampled_request_listens_to_all_and_is_probed(
    tiny: Target, plain: list[RequestResult], proposers: dict[int, Proposer], worth: Worth, monkeypatch: Any
) -> None:
    monkeypatch.setattr(listening, "SAMPLED", 4)
    results = serve(worth.engine(tiny, proposers, max_num_seqs=8, max_model_len=160), plain, NEURAL)
    assert [result.counts.drafted > 0 for result in results] == [False, False, False, True] * 2
    assert worth.handed > 0.5 * len(worth.layers) > 0


def late(
    target: Target, plain: Sequence[RequestResult], proposers: dict[int, Proposer], worth: Worth, version: int
) -> tuple[int, int, int]:
    """(tokens drafted, accepted, errors) of requests that begin to listen after ten steps."""
    drafted = accepted = errors = 0
    for want in plain[:4]:
        worth.pays = False
        engine = worth.engine(target, proposers)
        engine.add(request("x", want.payload.prompt_ids, version, max_tokens=LONG))
        outputs = [output for _ in range(10) for output in engine.step()]
        assert not worth.handed
        worth.pays = True
        while engine.has_work:
            outputs += engine.step()
        worth.layers.clear()
        result = run(engine, outputs)["x"]
        assert result.payload.output_ids == want.payload.output_ids
        drafted, accepted = drafted + result.counts.drafted, accepted + result.counts.accepted
        errors += result.draft_errors
    return drafted, accepted, errors


def test_a_request_may_begin_to_listen_in_the_middle(
    tiny: Target,
    plain: list[RequestResult],
    proposers: dict[int, Proposer],
    worth: Worth,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drafted, accepted, errors = late(tiny, plain, proposers, worth, NEURAL)
    assert errors == 0
    assert drafted > accepted > 50
    with monkeypatch.context() as faulty:  # nobody notices that states were missed
        faulty.setattr(DraftPool, "skip", lambda self, state, position: None)
        assert late(tiny, plain, proposers, worth, NEURAL)[2] == 4
    with monkeypatch.context() as faulty:  # slots would pair tokens with states of others
        skip = DraftPool.skip
        faulty.setattr(DraftPool, "skip", lambda self, state, at: (skip(self, state, at), state.tokens.append(1))[0])
        assert late(tiny, plain, proposers, worth, NEURAL)[2] == 4
    with monkeypatch.context() as faulty:  # it stays as it began
        faulty.setattr(Audience, "verdict", None)
        assert late(tiny, plain, proposers, worth, NEURAL)[0] == 0


def test_slots_may_begin_anywhere(tiny: Target, plain: list[RequestResult], proposers: dict[int, Proposer]) -> None:
    """A request that missed its first 20 positions drafts as one whose prompt begins there."""
    bound = engine_of(tiny, proposers)._proposers[NEURAL]
    assert isinstance(bound, HiddenReader)
    pool, layers = bound.pool, bound.aux_layers
    payload = plain[0].payload
    ids = [*payload.prompt_ids, *payload.output_ids][:50]
    model = tiny.model
    cache = KVCache(model.config, 1, 160, model.dtype, model.device)
    _, aux = Prefill(model, cache, ids).advance(len(ids), layers)
    assert aux is not None
    short, skipped = pool.start(ids[20:]), pool.start(ids[:15])
    pool.feed([(short, 0, aux[20:49])])
    pool.feed([(skipped, 0, aux[:9])])  # what it heard before is forgotten
    skipped.tokens += ids[15:]
    pool.skip(skipped, 20)
    pool.feed([(skipped, 20, aux[20:30])])
    pool.feed([(skipped, 30, aux[30:49])])
    wanted, got = pool.propose([Want(short, 4), Want(skipped, 4)])
    assert got.tokens == wanted.tokens
    assert got.confidence == pytest.approx(wanted.confidence)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_who_listens_changes_no_token(
    tiny: Target, proposers: dict[int, Proposer], worth: Worth, seed: int, captured: bool
) -> None:
    """Drafting pays and does not by turns; joins, leaves, sampling, prompts in chunks, preemptions."""
    rng = random.Random(seed)
    wanted = []
    for i, prompt in enumerate(prompts(tiny, 12, seed + 80)):
        sampled = {"temperature": 0.8, "top_p": 0.95, "seed": i} if rng.random() < 0.4 else {}
        version = rng.choice([NONE, NEURAL, HYBRID])
        wanted.append(request(f"r{i}", prompt, version, max_tokens=rng.randint(20, 60), **sampled))
    options = {"capture_on": lambda device: Tape()} if captured else {}
    engine = worth.engine(tiny, proposers, max_num_seqs=5, prefill_chunk=16, kv_tokens=320, **options)
    step = engine.step

    def stepping() -> Any:
        if rng.random() < 0.1:
            worth.pays = not worth.pays
        return step()

    engine.step = stepping  # type: ignore[method-assign]
    results, cancelled = run_at_random(engine, wanted, rng)
    assert 0 < worth.handed < len(worth.layers)
    for want in wanted:
        if want.request_id not in cancelled:
            got = results[want.request_id]
            single = alone(tiny, request("x", want.prompt_ids, NONE, **_sampling(want)))
            assert got.payload.output_ids == single.payload.output_ids, want
            assert got.draft_errors == 0


def _sampling(want: Any) -> dict[str, Any]:
    s = want.sampling
    return {"max_tokens": s.max_tokens, "temperature": s.temperature, "top_p": s.top_p, "seed": s.seed}
