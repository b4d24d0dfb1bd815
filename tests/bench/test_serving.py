"""Figures from blocks, and the whole benchmark on a model that answers in milliseconds."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.bench import serving
from engine.bench.blocks import NONE, Block, Run, best_figure, ratio_figure
from engine.bench.learned import Learned
from engine.bench.peers import blocks_of
from engine.bench.serving import Options
from engine.bench.workload import workloads
from engine.contracts import ProposerKind, SlipstreamError
from engine.learner.trainer import fresh_weights
from engine.model.draft import DraftConfig
from engine.model.loading import load_target
from engine.settings import Settings, load_settings
from engine.speculation.artifact import build_artifact
from engine.speculation.memory import MEMORY_FILE
from engine.speculation.neural_file import draft_files, pack
from tests.tiny_model import write_tiny_model


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_ratio_is_of_sums_over_paired_blocks(rng: np.random.Generator) -> None:
    machine = np.linspace(1, 5, 20)  # gets slower and slower; within a block both feel it
    figure = ratio_figure("x", [(Run(150, 2.0 * m), Run(100, 2.0 * m)) for m in machine], rng)
    assert figure.value == pytest.approx(1.5)
    assert (figure.low, figure.high) == pytest.approx((1.5, 1.5))
    unpaired = [(Run(150, 2.0 * a), Run(100, 2.0 * b)) for a, b in zip(machine, machine[::-1], strict=True)]
    spread = ratio_figure("x", unpaired, rng)
    assert spread.high - spread.low > 0.3


def blocks(rng: np.random.Generator, count: int, policies: int) -> list[Block]:
    """Policies that are all as fast as plain decoding, up to noise."""
    names = [NONE, *map(str, range(policies))]
    return [{name: Run(100, float(rng.lognormal(0, 0.3))) for name in names} for _ in range(count)]


def test_the_best_policy_is_not_chosen_by_the_luck_that_it_is_judged_by(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.bench.blocks.RESAMPLES", 2)
    made = [blocks(rng, 6, 8) for _ in range(200)]
    honest = np.mean([math.log(best_figure("x", one, rng).value) for one in made])
    lucky = np.mean(
        [
            math.log(max(ratio_figure("x", [(b[str(i)], b[NONE]) for b in one], rng).value for i in range(8)))
            for one in made
        ]
    )
    assert abs(honest) < 0.06
    assert lucky > 0.12  # what taking the largest ratio would have claimed


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    write_tiny_model(tmp_path / "tiny")
    flags = [f"home={tmp_path}", f"engine.model={tmp_path / 'tiny'}", "engine.dtype=float64", "engine.threads=1"]
    return load_settings(None, flags, {})


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows = [{"traffic_class": name, "turns": [f"{name} the one in the ring {i}"]} for i in range(24) for name in "ab"]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def options(prompts: Path) -> Options:
    return Options((prompts,), concurrency=(1, 4), learn=16, test=8, tokens=12, telemetry=False)


def test_every_figure_has_a_name_and_an_interval(settings: Settings, prompts: Path) -> None:
    lines: list[str] = []
    report = serving.run(settings, options(prompts), lines.append)
    figures = {figure.name: figure for figure in report.figures}
    assert len(figures) == len(report.figures)
    for name in ("a", "b"):
        for concurrency in (1, 4):
            for figure in ("ratio:best/none", "ratio:ngram/none", "ratio:memory/none", "tokens_per_s:none"):
                assert f"{figure}:{name}:c{concurrency}" in figures
            for metric in ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p95", "tpot_p99", "cpu_s_per_1000"):
                assert f"{metric}:memory:{name}:c{concurrency}" in figures
        assert figures[f"acceptance_length:memory:{name}"].value >= 1
    assert "tokens_per_s:none:all:c1" in figures
    for figure in report.figures:
        assert figure.low <= figure.value <= figure.high, figure
    assert any("c4 " in line for line in lines)
    assert any(line.startswith("generating") for line in lines)
    again: list[str] = []
    serving.run(settings, options(prompts), again.append)
    assert not any(line.startswith("generating") for line in again)  # they were kept


def test_learned_and_tested_prompts_are_disjoint(settings: Settings, prompts: Path) -> None:
    seen: list[serving.Workload] = []
    measure = serving.Bench.measure
    try:
        serving.Bench.measure = lambda self, workload: seen.append(workload) or measure(self, workload)  # type: ignore[method-assign,func-returns-value]
        serving.run(settings, options(prompts), lambda _: None)
    finally:
        serving.Bench.measure = measure  # type: ignore[method-assign]
    for workload in seen:
        assert (len(workload.learn), len(workload.test)) == (16, 8)
        assert not set(workload.learn) & set(workload.test)


def test_what_cannot_be_measured_says_so(settings: Settings, prompts: Path) -> None:
    for wrong, message in (
        ({"policies": ("ngram",)}, "must name none"),
        ({"policies": ("none", "oracle")}, "no policy 'oracle'"),
        ({"classes": ("poetry",)}, "no prompts of class poetry"),
        ({"test": 20}, "has 24 prompts"),
        ({"peers": ("x",), "classes": ("a",)}, "no peer 'x'"),
    ):
        with pytest.raises(SlipstreamError, match=message):
            serving.run(
                settings,
                Options(
                    **({"files": (prompts,), "test": 4, "tokens": 4, "concurrency": (1,), "telemetry": False} | wrong)
                ),
                print,
            )  # type: ignore[arg-type]


def test_a_hybrid_is_a_memory_beside_a_draft_that_learned_from_the_same_requests(
    settings: Settings, prompts: Path, tmp_path: Path
) -> None:
    chosen = replace(options(prompts), policies=("none", "hybrid"), concurrency=(2,), classes=("a",))
    with pytest.raises(SlipstreamError, match="--draft"):  # none is shipped for this target
        serving.run(settings, chosen, lambda _: None)
    target = load_target(str(tmp_path / "tiny"), tmp_path, dtype="float64", threads=1)
    shape = DraftConfig.of_target(target.config, 64)
    files = pack(shape, fresh_weights(shape, target.model, 0), torch.arange(64))
    policy = build_artifact(ProposerKind.NEURAL, 4, files=files, target_fingerprint=target.fingerprint)
    (tmp_path / "draft").mkdir()
    for name, data in policy.items():
        (tmp_path / "draft" / name).write_bytes(data)
    chosen = replace(chosen, draft=tmp_path / "draft")
    lines: list[str] = []
    report = serving.run(settings, chosen, lines.append)
    assert "acceptance_length:hybrid:a" in {figure.name for figure in report.figures}
    assert "tuning the draft of a on 16 responses" in lines

    def hybrid(tune_requests: int) -> dict[str, bytes]:
        own = settings.model_copy(
            update={"learner": settings.learner.model_copy(update={"tune_requests": tune_requests})}
        )
        work = workloads(target, chosen.files, ("a",), chosen.learn, chosen.test, chosen.longest, chosen.seed)[0]
        learned = Learned(own, target, chosen.draft, own.dir("bench"), lines.append)
        return learned.hybrid(work, [(ids, (1, 2, 3, 4)) for ids in work.learn], chosen.tokens)

    lines.clear()
    serving.run(settings, chosen, lines.append)
    assert not any(line.startswith("tuning") for line in lines)  # it was kept
    tuned, again, untuned = hybrid(96), hybrid(96), hybrid(0)
    assert sum(line.startswith("tuning") for line in lines) == 2  # not these responses, and not by this recipe
    assert tuned == again
    assert draft_files(untuned) == files != draft_files(tuned)
    assert untuned[MEMORY_FILE] == tuned[MEMORY_FILE]


def test_blocks_against_a_peer_are_full_and_enough() -> None:
    texts, order = [str(i) for i in range(21)], random.Random(0)
    for size, count in ((2, 10), (16, 4)):
        blocks = blocks_of(texts, size, order)
        assert len(blocks) == count
        assert all(len(set(block)) == size for block in blocks)
    with pytest.raises(SlipstreamError, match="raise --prompts"):
        blocks_of(texts, 22, order)
