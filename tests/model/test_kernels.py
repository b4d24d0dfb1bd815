"""The kernels against torch, with faults planted in their source."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.model import kernels
from engine.model.batch import Row, build_batch
from engine.model.kernels import KernelOps, compile_kernels
from engine.model.kv_cache import KVCache
from engine.model.llama import Llama
from engine.model.ops import Ops
from engine.model.random_weights import TINY, random_llama
from tests.model.planting import plant

CONFIG = replace(TINY, hidden_size=64, intermediate_size=96, num_heads=6, num_kv_heads=2, head_dim=32)
LENGTH = 256
TOLERANCE = 0.012  # of the worst row; bfloat16 has eight bits
CPU = torch.device("cpu")
TEXTS = [
    torch.randint(0, CONFIG.vocab_size, (200,), generator=torch.Generator().manual_seed(i)).tolist() for i in (1, 2, 3)
]
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_llama(CONFIG, dtype=torch.bfloat16)


def compiled(model: Llama) -> KernelOps:
    made = compile_kernels(CONFIG, model.cos, model.sin)
    assert made is not None
    return made


def decode(model: Llama, ops: Ops) -> torch.Tensor:
    """Hidden states of prompts and of decode rows: alone, drafted for, long and short, across blocks of keys."""
    plain, model.ops = model.ops, ops
    try:
        cache, found = KVCache(CONFIG, 3, LENGTH, torch.bfloat16), list[torch.Tensor]()

        def run(decodes: list[Row], prefills: list[Row], repeat: bool = False) -> None:
            batch = build_batch(decodes, prefills, LENGTH, CONFIG.group_size, torch.bfloat16, CPU, repeat)
            found.append(model.forward(batch, cache))

        run([], [Row(0, 0, TEXTS[0][:150]), Row(2, 0, TEXTS[2][:5])])
        run([Row(0, 150, TEXTS[0][150:153]), Row(2, 5, TEXTS[2][5:6])], [Row(1, 0, TEXTS[1][:64])])
        run([Row(1, 64, TEXTS[1][64:65])], [], repeat=True)
        run([Row(0, 153, TEXTS[0][153:163]), Row(1, 65, TEXTS[1][65:66]), Row(2, 6, TEXTS[2][6:7])], [])
        return torch.cat(found).float()
    finally:
        model.ops = plain


def off(model: Llama, ops: Ops) -> float:
    """By how much the worst row differs."""
    want = decode(model, model.ops)
    return float(((decode(model, ops) - want).norm(dim=-1) / want.norm(dim=-1)).max())


@needs_compiler
def test_kernels_compute_what_torch_computes(model: Llama) -> None:
    assert off(model, compiled(model)) < TOLERANCE


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("first <= last; first += KEYS", "first < last; first += KEYS"),  # forgets the token itself at a block's end
        ("high * load(sin + i)", "low * load(sin + i)"),
        ("acc[g][i] *= keep", "acc[g][i] *= 1.0f"),
        ("total[g] * keep", "total[g]"),
        ("sum(squares) / (float)n", "sum(squares)"),
        ("through_bf16(gate /", "through_bf16(-gate /"),
        ("store(mine + i, v)", "(void)0"),
        ("places[t] - positions[t]", "places[t] * 0"),
    ],
)
def test_a_fault_in_the_kernels_is_seen(
    model: Llama, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(kernels, right, wrong, tmp_path, monkeypatch)
    assert not off(model, compiled(model)) < TOLERANCE


@needs_compiler
def test_a_row_does_not_depend_on_its_neighbours(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, whoever decodes beside it, however long, and however much of it is drafted."""
    monkeypatch.setattr(model, "ops", compiled(model))
    first, second = (KVCache(CONFIG, 3, LENGTH, torch.bfloat16) for _ in range(2))

    def run(cache: KVCache, *rows: Row, prefill: bool = False) -> torch.Tensor:
        decodes, prompts = ([], list(rows)) if prefill else (list(rows), [])
        batch = build_batch(decodes, prompts, LENGTH, CONFIG.group_size, torch.bfloat16, CPU, repeat=True)
        return model.logits(model.forward(batch, cache))[: 1 if batch.repeated else None]

    for cache in (first, second):
        run(cache, Row(1, 0, TEXTS[1][:60]), prefill=True)
    alone = torch.cat([run(first, Row(1, at, TEXTS[1][at : at + 1])) for at in range(60, 70)])
    run(second, Row(0, 0, TEXTS[0][:180]), prefill=True)
    beside = [run(second, Row(0, 180, TEXTS[0][180:182]), Row(1, 60, TEXTS[1][60:63]))[2:]]
    beside.append(run(second, Row(0, 182, TEXTS[0][182:183]), Row(1, 63, TEXTS[1][63:70]))[1:])
    assert torch.equal(torch.cat(beside), alone)


def test_without_a_compiler_there_is_torch(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.model.compiler.shutil.which", lambda name: None)
    assert compile_kernels(CONFIG, model.cos, model.sin) is None


@needs_compiler
def test_what_does_not_compile_is_said_and_torch_runs(
    model: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kernels.c").write_text("int broken(")
    monkeypatch.setattr(kernels, "SOURCE", tmp_path / "kernels.c")
    assert compile_kernels(CONFIG, model.cos, model.sin) is None
    assert "cannot be compiled" in caplog.text


def test_other_models_and_dtypes_run_by_torch(model: Llama) -> None:
    assert compile_kernels(replace(CONFIG, head_dim=16), model.cos, model.sin) is None
    assert compile_kernels(replace(CONFIG, qk_norm=True), model.cos, model.sin) is None
    assert compile_kernels(CONFIG, model.cos.double(), model.sin.double()) is None
