"""Weights in int8: what their product computes, with faults planted in its source, and whose model they make."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.contracts import SlipstreamError, Status
from engine.model import int8, product
from engine.model.int8 import GROUP, Int8Panels, from_int8_panels, multiply_int8, to_int8, to_int8_panels
from engine.model.kv_cache import KVCache
from engine.model.linear import Layout, copy_in_place, dense
from engine.model.llama import Llama
from engine.model.loading import load_target
from engine.model.random_weights import TINY, random_tensors
from engine.runner.rescoring import Rescoring
from tests.model.planting import ROWS, assert_rows_stand_alone, plant
from tests.model.test_swap import logits
from tests.runner.driving import engine_of, request, run
from tests.tiny_model import write_tiny_model

compiled = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")
SHAPES = ((96, 64), (40, 35), (16, 1))  # whole panels and groups, parts of both, a single column


@pytest.fixture(autouse=True)
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that has no product of its own for it, which bytes are for."""
    monkeypatch.setattr("engine.model.linear.multiplies_bfloat16", lambda: False)


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """For a test with another source or another compiler."""
    products = (int8._product, product._product)
    for one in products:
        one.cache_clear()
    yield
    for one in products:
        one.cache_clear()


def panels_of(weight: torch.Tensor) -> Int8Panels:
    panels = to_int8_panels(to_int8(weight))
    assert panels is not None
    return panels


def off() -> float:
    """By how much the worst output differs from that of the dense rounded weight, in what its rounding allows: one of
    the output to bfloat16, and one of each activation to 2^-15 of the largest of its group."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for outputs, inputs in SHAPES:
        weight = torch.randn(outputs, inputs, generator=generator)
        rounded, panels = to_int8(weight).dense().double(), panels_of(weight)
        for rows in ROWS:
            loud = 2.0 ** (torch.arange(rows) % 7)[:, None].bfloat16()
            x = torch.randn(rows, inputs, generator=generator).bfloat16() * loud
            want, got = x.double() @ rounded.t(), multiply_int8(x, panels)
            assert got.shape == want.shape
            allowed = 2**-8 * want.abs() + 2**-15 * x.double().abs().amax(-1, keepdim=True) * rounded.abs().sum(-1)
            if rows:
                worst = max(worst, float(((got.double() - want).abs() / allowed).nan_to_num(torch.inf).max()))
    return worst


@compiled
def test_a_product_is_that_of_the_rounded_weight() -> None:
    assert off() < 1


@compiled
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(scale * x_scales[r * groups + g])", "x_scales[r * groups + g]"),
        ("x_scales[r * groups + g])", "x_scales[g])"),
        ("* groups + g) * PANEL + v", "* groups) * PANEL + v"),
        ("+ 2 * k, sizeof pair", "+ k, sizeof pair"),
        ("real((exponent - down) << 23)", "real((exponent - down + 1) << 23)"),
        ("n_in - at < GROUP ?", "0 ?"),
        ("rows * (t + 1) / tiles - row", "rows * (t + 1) / tiles - row - (t > 0)"),
        ("panel < last; panel += done", "panel < last - 1; panel += done"),
        ("TILE(3, 1);", "TILE(2, 1);"),
    ],
)
def test_a_fault_in_the_product_is_seen(
    compiled_anew: None, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(int8, right, wrong, tmp_path, monkeypatch)
    assert not off() < 1


@compiled
def test_the_product_of_processors_without_avx2_is_the_same(
    compiled_anew: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(7, 64).bfloat16(), torch.randn(40, 64)
    here = multiply_int8(x, panels_of(weight))
    (tmp_path / "int8.c").write_text(int8.SOURCE.read_text().replace("__AVX2__", "NOT_HERE"))
    monkeypatch.setattr(int8, "SOURCE", tmp_path / "int8.c")
    int8._product.cache_clear()
    assert torch.equal(multiply_int8(x, panels_of(weight)), here)


@compiled
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    assert_rows_stand_alone(multiply_int8, panels_of(weight))


@compiled
def test_what_is_no_number_stays_none_and_what_is_next_to_nothing_becomes_nothing() -> None:
    panels = panels_of(torch.ones(16, 64))
    x = torch.ones(4, 64).bfloat16()
    x[0, 3], x[1, 40], x[2] = torch.nan, torch.inf, 1e-38
    got = multiply_int8(x, panels)
    assert not got[:2].isfinite().any()
    assert torch.equal(got[2:], torch.tensor([0.0, 64.0])[:, None].expand(2, 16).bfloat16())


def test_rounding_errs_by_half_a_step_and_only_once() -> None:
    weight = torch.randn(8, 3 * GROUP - 5)
    weight[3] = 0
    once = to_int8(weight)
    step = once.scales.float().repeat_interleave(GROUP, 1)[:, : weight.shape[1]]
    assert ((once.dense() - weight).abs() <= step * 0.76).all()  # the scale is rounded too: a quarter at the end
    again = to_int8(once.dense())
    assert torch.equal(again.whole, once.whole)
    assert torch.equal(again.scales, once.scales)


@compiled
def test_panels_hold_what_was_rounded_and_are_not_written_over() -> None:
    weight = to_int8(torch.randn(40, 35))
    panels = to_int8_panels(weight)
    assert panels is not None
    assert torch.equal(from_int8_panels(panels).dense(), weight.dense())
    assert torch.equal(dense(panels), weight.dense().bfloat16())
    with pytest.raises(SlipstreamError, match="A target cannot take these weights in place: qkv is in a layout of its"):
        copy_in_place({"qkv": panels}, {"qkv": panels}, "A target")


def test_a_model_is_the_one_of_its_rounded_checkpoint() -> None:
    """All matrices are rounded once, from what the checkpoint says, in whatever they are held; vectors are not."""
    cpu, tensors = torch.device("cpu"), random_tensors(TINY, 1)
    by_hand = {name: to_int8(t).dense().double() if t.ndim == 2 else t for name, t in tensors.items()}
    want = Llama.from_checkpoint(TINY, by_hand, torch.float64, cpu)
    model = Llama.from_checkpoint(TINY, tensors, torch.float64, cpu, int8=True)
    assert torch.equal(logits(model), logits(want))
    assert not torch.allclose(logits(model), logits(Llama.from_checkpoint(TINY, tensors, torch.float64, cpu)))
    other = random_tensors(TINY, 2)
    model.copy_weights(other)
    assert torch.equal(logits(model), logits(Llama.from_checkpoint(TINY, other, torch.float64, cpu, int8=True)))


@compiled
def test_a_model_in_panels_answers_as_the_dense_one() -> None:
    cpu, tensors = torch.device("cpu"), random_tensors(TINY, 1, torch.float32)
    exact = logits(Llama.from_checkpoint(TINY, tensors, torch.float64, cpu, int8=True))
    model = Llama.from_checkpoint(TINY, tensors, torch.bfloat16, cpu, int8=True)
    assert isinstance(model._head, Int8Panels)
    assert isinstance(model.layers[1].down, Int8Panels)
    scale = exact.std()
    assert (logits(model) - exact).std() < 0.02 * scale
    model.layers[0].down = to_int8_panels(to_int8(dense(model.layers[0].down) * 1.5))  # planted: a wrong scale
    assert (logits(model) - exact).std() > 0.02 * scale


@compiled
def test_it_is_another_target_that_serves_and_is_audited(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    plain = load_target(str(tmp_path), tmp_path, dtype="float64")
    target = load_target(str(tmp_path), tmp_path, dtype="bfloat16", weights="int8")
    exact = load_target(str(tmp_path), tmp_path, dtype="float64", weights="int8")
    assert target.fingerprint == exact.fingerprint != plain.fingerprint
    assert isinstance(target.model.layers[0].out, Int8Panels)
    engine = engine_of(target, prefill_chunk=16)
    for n in range(3):
        engine.add(request(str(n), range(20 + n), max_tokens=8))
    for n, result in run(engine).items():
        assert result.status is Status.OK
        cache = KVCache(target.config, 1, 64, target.model.dtype)
        audit = Rescoring(target.model, cache, range(20 + int(n)), result.payload.output_ids)
        while not audit.is_done:
            audit.advance(8)
        assert audit.mismatch is None


def test_without_a_compiler_the_same_model_is_held_in_its_dtype(
    compiled_anew: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("engine.model.compiler.shutil.which", lambda name: None)
    write_tiny_model(tmp_path)
    with caplog.at_level(logging.WARNING):
        target = load_target(str(tmp_path), tmp_path, dtype="bfloat16", weights="int8")
    assert "no faster: their product is for a CPU that has none" in caplog.text
    rounded = load_target(str(tmp_path), tmp_path, dtype="float32", weights="int8").model
    assert torch.equal(dense(target.model.layers[0].out), dense(rounded.layers[0].out).bfloat16())
    with pytest.raises(SlipstreamError, match="weights must be checkpoint or int8, got 'int4'"):
        load_target(str(tmp_path), tmp_path, weights="int4")


def test_a_processor_that_multiplies_bfloat16_gets_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(torch.bfloat16, int8=True)
    monkeypatch.setattr("engine.model.linear.multiplies_bfloat16", lambda: True)
    assert layout.panels(torch.randn(40, 35)) is None


def test_only_int8_is_rounded() -> None:
    weight = torch.randn(8, 32)
    assert Layout(torch.float32).plain(weight) is weight
    assert Layout(torch.float32).packed(weight) is weight
