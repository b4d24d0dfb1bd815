"""The kernels against torch, with faults planted in their source."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.model import compiler, kernels, product
from engine.model.batch import Row
from engine.model.crew import Crew
from engine.model.kernels import Kernels, compile_kernels
from engine.model.kv_cache import KVCache
from engine.model.llama import Llama
from engine.model.random_weights import TINY, random_llama
from tests.model.planting import LATE, plant

CONFIG = replace(TINY, hidden_size=64, intermediate_size=96, num_heads=6, num_kv_heads=2, head_dim=64)
LENGTH = 256
TOLERANCE = 0.012  # of the worst row; bfloat16 has eight bits
CPU = torch.device("cpu")
TEXTS = [
    torch.randint(0, CONFIG.vocab_size, (200,), generator=torch.Generator().manual_seed(i)).tolist() for i in (1, 2, 3)
]
NATIVE = "-march=native"
UNPAIRED, OLDER = "-march=x86-64-v4", "-march=x86-64-v3"  # no products in bfloat16; and half the lanes
needs_pairs = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="no AVX512-BF16")
needs_avx2 = pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="no AVX2")
needs_avx512 = pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="no AVX-512")
on_each = pytest.mark.parametrize(
    "compiled_for",
    [NATIVE, pytest.param(UNPAIRED, marks=needs_avx512), pytest.param(OLDER, marks=needs_avx2)],
    indirect=True,
)
on_older = pytest.mark.parametrize("compiled_for", [pytest.param(OLDER, marks=needs_avx2)], indirect=True)
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_llama(CONFIG, dtype=torch.bfloat16)


@pytest.fixture
def compiled_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The processor that the sources are compiled for."""
    if request.param != NATIVE:
        monkeypatch.setattr(compiler, "FLAGS", [request.param if flag == NATIVE else flag for flag in compiler.FLAGS])
        monkeypatch.setattr(product, "SOURCE", product.SOURCE.with_name("product.c"))
    product._product.cache_clear()
    yield
    product._product.cache_clear()


def compiled(model: Llama) -> Kernels:
    made = compile_kernels(model)
    assert made is not None
    made.crew = Crew(1)  # a test says how many threads there are
    return made


def decode(model: Llama, kernels: Kernels | None) -> torch.Tensor:
    """Hidden states of prompts and of decode rows, alone, drafted for, long and short, across blocks of keys; and what
    two layers gave out."""
    model.kernels = kernels
    try:
        cache, found = KVCache(model.config, 3, LENGTH, torch.bfloat16), list[torch.Tensor]()

        def run(decodes: list[Row], prefills: list[Row]) -> None:
            hidden, aux = model.forward_with_aux(model.lay_out(decodes, prefills, LENGTH), cache, (1, 0))
            assert aux is not None
            found.append(torch.cat([hidden, aux], -1))

        run([], [Row(0, 0, TEXTS[0][:150]), Row(2, 0, TEXTS[2][:5])])
        run([Row(0, 150, TEXTS[0][150:153]), Row(2, 5, TEXTS[2][5:6])], [Row(1, 0, TEXTS[1][:64])])
        run([Row(1, 64, TEXTS[1][64:65])], [])
        run([Row(0, 153, TEXTS[0][153:163]), Row(1, 65, TEXTS[1][65:66]), Row(2, 6, TEXTS[2][6:7])], [])
        return torch.cat(found).float()
    finally:
        model.kernels = None


def off(model: Llama) -> float:
    """By how much the worst row differs from torch's."""
    want = decode(model, None)
    return float(((decode(model, compiled(model)) - want).norm(dim=-1) / want.norm(dim=-1)).max())


@needs_compiler
@on_each
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"qkv_bias": True},
        {"qk_norm": True},
        {"head_dim": 96},
        {"head_dim": 32},
        {"num_heads": 5, "num_kv_heads": 1},
        {"num_heads": 8, "num_kv_heads": 2},
        {"num_kv_heads": 6},
    ],
    ids=str,
)
def test_kernels_compute_what_torch_computes(changed: dict[str, int], compiled_for: None) -> None:
    assert off(random_llama(replace(CONFIG, **changed), dtype=torch.bfloat16)) < TOLERANCE


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("first <= last; first += KEYS", "first < last; first += KEYS"),  # forgets the token itself at a block's end
        ("sees < KEYS ? (int)sees : KEYS;", "KEYS;"),  # looks at what comes after it
        ("lanes < count - s * LANES", "lanes <= count - s * LANES"),
        ("row[k] = *(const words *)(key + at * stride + first)", "row[k] = *(const words *)(key + at * stride)"),
        ("2 * COLUMN(i)) / PAIRED", "2 * i) / PAIRED"),
        pytest.param("(g + h) * HEAD_DIM + d * PAIRED", "(g + h) * HEAD_DIM + d", marks=needs_pairs),
        ("value + first * stride, stride, count", "value, stride, count"),  # who looks alone
        ("load(value + (first + k) * stride", "load(value + k * stride"),  # who looks with others
        ("scores[h][s] *= scale", "(void)scale"),
        ("lines / turns + 1}", "lines / turns + 1}, key += stride * (next == 1)"),  # another's keys
        ("high * load(sin + i)", "low * load(sin + i)"),
        ("seen->sums[g + h][i] *= keep", "seen->sums[g + h][i] *= 1.0f"),
        ("seen->total[g + h] * keep", "seen->total[g + h]"),
        ("sum(squares) / (float)n", "sum(squares)"),
        ("through_bf16(gate /", "through_bf16(-gate /"),
        ("store(x + i, v)", "(void)0"),
        ("first = places[t] - positions[t];", "first = 0;"),
        ("|| places[t] != places[t - 1] + 1 || positions[t] != positions[t - 1] + 1", ""),  # who follows whom
        ("aux[j] == i - 1", "aux[j] == i"),
        ("num_aux + j) * hidden", "num_aux) * hidden"),
    ],
)
def test_a_fault_in_the_kernels_is_seen(
    model: Llama, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(kernels, right, wrong, tmp_path, monkeypatch)
    assert not off(model) < TOLERANCE


@needs_compiler
@on_older
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(vec)(row[i] & 0xffff0000u)", "wide(row[i])"),
        ("sum + *query * keys", "sum + *query"),
        ("x += OTHER(x, 4);", "x += OTHER(x, 2);"),
    ],
)
def test_a_fault_for_an_older_processor_is_seen(
    model: Llama, right: str, wrong: str, compiled_for: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(kernels, right, wrong, tmp_path, monkeypatch)
    assert not off(model) < TOLERANCE


@needs_compiler
def test_a_row_does_not_depend_on_its_neighbours(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, whoever decodes beside it, however long, and however much of it is drafted."""
    monkeypatch.setattr(model, "kernels", compiled(model))
    first, second = (KVCache(CONFIG, 3, LENGTH, torch.bfloat16) for _ in range(2))

    def run(cache: KVCache, *rows: Row, prefill: bool = False) -> torch.Tensor:
        decodes, prompts = ([], list(rows)) if prefill else (list(rows), [])
        return model.logits(model.forward(model.lay_out(decodes, prompts, LENGTH), cache))

    for cache in (first, second):
        run(cache, Row(1, 0, TEXTS[1][:60]), prefill=True)
    alone = torch.cat([run(first, Row(1, at, TEXTS[1][at : at + 1])) for at in range(60, 70)])
    run(second, Row(0, 0, TEXTS[0][:180]), prefill=True)
    beside = [run(second, Row(0, 180, TEXTS[0][180:182]), Row(1, 60, TEXTS[1][60:63]))[2:]]
    beside.append(run(second, Row(0, 182, TEXTS[0][182:183]), Row(1, 63, TEXTS[1][63:70]))[1:])
    assert torch.equal(torch.cat(beside), alone)
    chunk = run(second, Row(2, 0, TEXTS[1][:37]), prefill=True), run(second, Row(2, 37, TEXTS[1][37:70]), prefill=True)
    assert torch.equal(torch.cat(chunk)[60:], alone)  # whether they are a prompt or decoded, in whatever chunks


@needs_compiler
def test_the_number_of_threads_changes_no_bit(model: Llama, threads: Callable[[int], None]) -> None:
    """More of them than processors, heads of a tile and rows."""
    made = compiled(model)
    threads(1)
    alone = decode(model, made)
    for count in (2, 3, 7):
        threads(count)
        assert torch.equal(decode(model, made), alone), count


@needs_compiler
def test_late_threads_change_no_bit(
    model: Llama, threads: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(1)
    alone = decode(model, compiled(model))
    plant(kernels, *LATE, tmp_path, monkeypatch)
    threads(3)
    assert torch.equal(decode(model, compiled(model)), alone)


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [("NULL, qk_norm + i, query", "NULL, NULL, query"), ("i < (GROUP + 1) * stride", "i < GROUP * stride")],
)
def test_a_fault_in_the_norm_of_queries_and_keys_is_seen(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    normed = random_llama(replace(CONFIG, qk_norm=True), dtype=torch.bfloat16)
    for layer in normed.layers:
        assert layer.qk_norm is not None
        layer.qk_norm.mul_(torch.linspace(0.8, 1.2, layer.qk_norm.numel()).view_as(layer.qk_norm))
    assert off(normed) < TOLERANCE
    plant(kernels, right, wrong, tmp_path, monkeypatch)
    assert not off(normed) < TOLERANCE


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("i < some.end * LANES", "i < some.end * LANES - LANES"),
        ("some.begin % parts * heads", "0 * heads"),
        ("h < head + heads", "h < heads"),
        ("at = some.begin * n;", "at = some.begin / 2 * n;"),
    ],
)
def test_a_fault_in_what_a_thread_does_is_seen(
    model: Llama,
    right: str,
    wrong: str,
    threads: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads(3)
    plant(kernels, right, wrong, tmp_path, monkeypatch)
    assert not off(model) < TOLERANCE


def test_without_a_compiler_there_is_torch(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.model.compiler.shutil.which", lambda name: None)
    assert compile_kernels(model) is None


@needs_compiler
def test_what_does_not_compile_is_said_and_torch_runs(
    model: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "layers.c").write_text("int broken(")
    monkeypatch.setattr(kernels, "SOURCE", tmp_path / "layers.c")
    assert compile_kernels(model) is None
    assert "cannot be compiled" in caplog.text


@needs_compiler
@pytest.mark.parametrize("changed", [{"head_dim": 16}, {"hidden_size": 40}], ids=str)
def test_other_models_run_by_torch(changed: dict[str, int]) -> None:
    assert compile_kernels(random_llama(replace(CONFIG, **changed), dtype=torch.bfloat16)) is None


def test_other_dtypes_run_by_torch() -> None:
    assert compile_kernels(random_llama(CONFIG)) is None
