"""Captured passes on a real CUDA device. The same properties are tested on a CPU beside; here the graphs are real."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.learner.features import example
from engine.learner.trainer import Trainer, TrainOptions, fresh_weights
from engine.model.draft import DraftConfig
from engine.model.graphs import Capture, CudaCapture, graphs_on, no_graphs_on
from engine.model.loading import Target, load_target
from engine.model.random_weights import random_tensors
from engine.model.staged import Staged
from engine.runner.captured_pass import CapturedPass
from engine.runner.engine import Engine, EngineRequest, Output, RequestResult
from engine.speculation.captured_pool import CapturedPool
from engine.speculation.neural import NeuralProposer
from engine.speculation.proposer import HiddenReader, Proposer
from tests.runner.drafts import random_draft
from tests.runner.driving import NGRAM, NONE, alone, engine_of, request, run, run_at_random
from tests.runner.test_exactness import prompts
from tests.tiny_model import write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device: captured passes are tested on a stand-in"
    ),
]
WILD = 5
CaptureOn = Callable[[torch.device], Capture | None]


def on_cuda(folder: Path, dtype: str) -> Target:
    write_tiny_model(folder, seed=3)
    return load_target(str(folder), folder, dtype=dtype, device="cuda")


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return on_cuda(tmp_path_factory.mktemp("exact"), "float64")


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return on_cuda(tmp_path_factory.mktemp("coarse"), "bfloat16")


def drafting(target: Target, seed: int = 0) -> dict[int, Proposer]:
    return {WILD: NeuralProposer(4, random_draft(target, seed=seed), 0.0)}


def mixed(target: Target, seed: int) -> list[EngineRequest]:
    rng, wanted = random.Random(seed), []
    for i, prompt in enumerate(prompts(target, 12, seed)):
        sampled = {"temperature": 0.8, "top_p": 0.9, "seed": i} if rng.random() < 0.3 else {}
        version = rng.choice([NONE, NGRAM, WILD])
        wanted.append(request(f"r{i}", prompt, version, max_tokens=rng.randint(1, 30), **sampled))
    return wanted


def served(target: Target, capture_on: CaptureOn, seed: int) -> dict[str, RequestResult]:
    """Requests that join and leave at random; the draws do not depend on how the passes run."""
    engine = engine_of(target, drafting(target), max_num_seqs=5, prefill_chunk=16, capture_on=capture_on)
    results, cancelled = run_at_random(engine, mixed(target, seed), random.Random(seed))
    assert engine.step_errors == engine.draft_errors == 0
    return {name: result for name, result in results.items() if name not in cancelled}


@pytest.mark.parametrize("seed", range(3))
def test_captured_passes_say_what_the_cpu_says(exact: Target, tiny: Target, seed: int) -> None:
    """In float64, where no sum is near a tie: the same weights, so the same tokens, drafts and counts."""
    wanted = {want.request_id: want for want in mixed(exact, seed)}
    for name, result in served(exact, graphs_on, seed).items():
        single = alone(tiny, wanted[name], drafting(tiny))
        assert (result.payload, result.counts) == (single.payload, single.counts)


@pytest.mark.parametrize("seed", range(3))
def test_captured_and_called_passes_are_equal_bit_for_bit(coarse: Target, seed: int) -> None:
    captured, called = served(coarse, graphs_on, seed), served(coarse, no_graphs_on, seed)
    assert {n: r.payload for n, r in captured.items()} == {n: r.payload for n, r in called.items()}


def graphs(engine: Engine) -> tuple[CapturedPass, CapturedPool]:
    target_pass = engine.runner.target_pass
    (pool,) = [bound.pool for bound in engine._proposers.values() if isinstance(bound, HiddenReader)]
    assert isinstance(target_pass, CapturedPass)
    assert isinstance(pool, CapturedPool)
    return target_pass, pool


def answers(engine: Engine, version: int) -> list[tuple[int, ...]]:
    for i, prompt in enumerate(prompts(engine.target, 4)):
        engine.add(request(str(i), prompt, version, max_tokens=20))
    results = run(engine)
    return [results[str(i)].payload.output_ids for i in range(4)]


def test_swaps_go_on_in_the_same_graphs(tmp_path: Path) -> None:
    target = on_cuda(tmp_path, "float64")
    engine = engine_of(target, drafting(target))
    old = answers(engine, WILD)
    target_pass, pool = graphs(engine)
    held = len(target_pass.graphs), len(pool.graphs)
    target.model.copy_weights(random_tensors(target.config, 8))
    engine.unload(WILD)
    engine.load(6, drafting(target, seed=1)[WILD])
    assert graphs(engine) == (target_pass, pool)
    new = answers(engine, 6)
    assert new != old
    assert new == answers(engine_of(target, capture_on=no_graphs_on), NONE)
    assert (len(target_pass.graphs), len(pool.graphs)) == held


@pytest.mark.parametrize(("versions", "most"), [((NGRAM, NONE, NONE), 1), ((NGRAM, WILD, WILD), 2)])
def test_a_step_waits_once_and_once_more_for_a_neural_draft(
    coarse: Target, versions: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, waits, fetch = engine_of(coarse, drafting(coarse), max_num_seqs=3), 0, Staged.fetch

    def counted(self: Staged, count: int) -> list[int] | list[float]:
        nonlocal waits
        waits += 1
        torch.cuda.set_sync_debug_mode("default")
        try:
            return fetch(self, count)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    def begin() -> list[Output]:
        outputs: list[Output] = []
        for i, (prompt, version) in enumerate(zip(prompts(coarse, 3), versions, strict=True)):
            engine.add(request(str(i), prompt, version, max_tokens=40, temperature=0.7 * (i == 2), seed=1))
        while any(seq.in_prefill for seq in engine.scheduler.running.values()) or engine.scheduler.waiting:
            outputs += engine.step()
        return outputs

    run(engine, begin())  # captures every size that these requests come to
    held = [len(part.graphs) for part in graphs(engine)]
    begin()
    monkeypatch.setattr(Staged, "fetch", counted)
    steps = 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        while engine.has_work:
            engine.step()
            steps += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.step_errors == engine.draft_errors == 0
    assert [len(part.graphs) for part in graphs(engine)] == held
    assert steps < waits <= most * steps if most > 1 else waits == steps


def test_a_draft_learns_on_cuda_what_it_learns_on_the_cpu(exact: Target, tiny: Target) -> None:
    rng, ids = random.Random(0), range(3, tiny.config.vocab_size)
    pairs = [(rng.choices(ids, k=6), rng.choices(ids, k=rng.randint(2, 14))) for _ in range(6)]
    trained = []
    for target in (exact, tiny):
        config = DraftConfig.of_target(target.config, 64)
        trainer = Trainer(
            target.model, config, fresh_weights(config, target.model, 0), torch.arange(64), TrainOptions(lr=1e-2)
        )
        examples = [example(target.model, p, o, config.aux_layers, torch.float64) for p, o in pairs]
        losses = [trainer.step(examples).loss for _ in range(3)]
        trained.append((losses, {name: weight.detach().cpu() for name, weight in trainer.weights.items()}))
    torch.testing.assert_close(
        trained[0], trained[1], rtol=1e-4, atol=1e-6
    )  # AdamW divides by roots of small gradients


def test_a_capture_reads_what_is_there_when_it_is_replayed() -> None:
    x, out = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")
    capture = CudaCapture(torch.device("cuda"))
    replays = [capture(lambda k=k: out.copy_(x * k)) for k in (2, 3)]
    x.fill_(5.0)
    for replay, k in zip(replays, (2, 3), strict=True):
        replay()
        assert out.tolist() == [5.0 * k] * 4
