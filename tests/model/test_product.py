"""The products for bfloat16 on a CPU, with faults planted in their sources."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from engine.contracts import Status
from engine.learner.trainer import fresh_weights
from engine.model import linear, product
from engine.model.draft import DraftConfig, DraftNetwork
from engine.model.loading import load_target
from engine.model.product import from_panels, multiply, to_panels
from tests.model.planting import ROWS, assert_rows_stand_alone, plant
from tests.runner.driving import engine_of, request, run
from tests.tiny_model import write_tiny_model

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")
SHAPES = ((288, 64), (40, 34), (16, 2), (120, 226))  # whole panels, a part of one, a single one, several chunks


SEEDS = count()
FLOATS, PAIRS = (Path(product.__file__).with_name(name) for name in ("product.c", "dot_product.c"))
needs_pairs = pytest.mark.skipif(product.SOURCE != PAIRS, reason="this processor does not multiply bfloat16")
of_both = pytest.mark.parametrize(
    "source", [FLOATS, pytest.param(PAIRS, marks=needs_pairs)], indirect=True, ids=lambda source: source.stem
)


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """For a test with another source or another compiler."""
    product._product.cache_clear()
    yield
    product._product.cache_clear()


@pytest.fixture
def source(request: pytest.FixtureRequest, compiled_anew: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The product that is compiled in this test."""
    monkeypatch.setattr(product, "SOURCE", request.param)
    return product.SOURCE


def off() -> float:
    """By how much the worst output differs from a product of floats, beyond its own rounding to bfloat16."""
    # Other numbers in every call: memory that was not written must not hold what an earlier one put there.
    generator, worst = torch.Generator().manual_seed(next(SEEDS)), 0.0
    for outputs, inputs in SHAPES:
        weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
        panels = to_panels(weight)
        assert panels is not None
        for rows in ROWS:
            x = torch.randn(rows, inputs, generator=generator).bfloat16()
            want = x.double() @ weight.double().t()
            got = multiply(x, panels)
            assert got.shape == want.shape
            if rows:
                errors = (got.double() - want).abs() / (want.abs() + 1e-2)
                worst = max(worst, float(errors.nan_to_num(torch.inf).max()))
    return worst


@of_both
def test_a_product_is_that_of_floats_rounded_once(source: Path) -> None:
    assert off() < 2**-8 * 1.01


@pytest.mark.parametrize(
    ("source", "right", "wrong"),
    [
        (FLOATS, "pair << 16", "pair & 0xffff0000u"),
        (FLOATS, "x + k + odd", "x + k"),
        (FLOATS, "+ 0x7fff +", "+"),
        (FLOATS, "rows * (t + 1) / tiles - row", "rows * (t + 1) / tiles - row - (t > 0)"),
        (FLOATS, "panel < last; panel += done", "panel < last - 1; panel += done"),
        (FLOATS, "TILE(3, 1);", "TILE(2, 1);"),
        *(
            pytest.param(PAIRS, right, wrong, marks=needs_pairs)
            for right, wrong in (
                ("+ 0x7fff +", "+"),
                ("else for (int64_t i = 0; i < count; i++) at[i] = out[i];", ""),
                ("pair[r * pairs + k]", "pair[k]"),
                ("out + r * n_out + first + p * PANEL, sums", "out + r * n_out + first, sums"),
                ("rows * (t + 1) / tiles - row", "rows * (t + 1) / tiles - row - (t > 0)"),
                ("panel < last; panel += done", "panel < last - 1; panel += done"),
                ("NAME##_3_6, NAME##_4_6", "NAME##_3_6, NAME##_3_6"),
                ("panels == 4 ? NAME##_4_4", "panels == 4 ? NAME##_4_1"),
                ("if (panels == 2) return two[rows];", "if (panels == 2) return one[rows];"),
                ("part.from ? kept[r * P + p]", "part.from > part.to ? kept[r * P + p]"),  # the last chunk alone
                ("kept[t % FEW], out", "kept[0], out"),  # one tile's sums over another's
                ("from + chunk < pairs ? from + chunk : pairs;", "from + chunk;"),
                ("tiles <= FEW ? CHUNK", "tiles <= 2 * FEW ? CHUNK"),  # more tiles than are kept
            )
        ),
    ],
    indirect=["source"],
)
def test_a_fault_in_the_product_is_seen(
    source: Path, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(product, right, wrong, tmp_path, monkeypatch)
    assert not off() < 2**-8 * 1.01


@of_both
def test_a_row_does_not_depend_on_its_neighbours(source: Path) -> None:
    for inputs in (64, 226):
        panels = to_panels(torch.randn(96, inputs, generator=torch.Generator().manual_seed(1)).bfloat16())
        assert panels is not None
        assert_rows_stand_alone(multiply, panels)


def test_panels_hold_the_weight_itself() -> None:
    weight = torch.randn(40, 34).bfloat16()
    panels = to_panels(weight)
    assert panels is not None
    assert torch.equal(from_panels(panels), weight)


def test_what_cannot_be_laid_out_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = torch.randn(8, 33).bfloat16()
    assert to_panels(odd) is None
    monkeypatch.setattr(linear, "multiplies_bfloat16", lambda: False)
    assert linear.pack(odd) is odd
    assert isinstance(linear.pack(torch.randn(8, 32).bfloat16()), product.Panels)


def test_without_a_compiler_there_is_torch(compiled_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.model.compiler.shutil.which", lambda name: None)
    assert not product.multiplies()
    assert to_panels(torch.randn(16, 32).bfloat16()) is None


def test_a_prompt_is_computed_in_chunks_that_ask_for_no_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first chunks, with nobody decoding beside them, multiply the head with no row at all."""
    monkeypatch.setattr(linear, "multiplies_bfloat16", lambda: False)
    write_tiny_model(tmp_path)
    target = load_target(str(tmp_path), tmp_path, dtype="bfloat16")
    assert isinstance(target.model.layers[0].out, product.Panels)
    rows, logits = list[int](), target.model.logits

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(hidden.shape[0])
        return logits(hidden)

    monkeypatch.setattr(target.model, "logits", counted)
    engine = engine_of(target, prefill_chunk=16)
    engine.add(request("x", range(40), max_tokens=3))
    assert run(engine)["x"].status is Status.OK
    assert rows == [0, 0, 1, 1, 1]


def test_kernels_switched_off_are_off_for_products_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "multiplies_bfloat16", lambda: False)
    write_tiny_model(tmp_path)
    model = load_target(str(tmp_path), tmp_path, dtype="bfloat16", kernels=False).model
    config = DraftConfig.of_target(model.config, 16)
    draft = DraftNetwork(config, fresh_weights(config, model, 0), torch.arange(16), model)
    weights = [weight for layer in model.layers for weight in layer.weights().values()]
    assert not any(isinstance(one, product.Panels) for one in (*weights, model._head, *draft.matrices.values()))
    assert isinstance(draft.packed_head, torch.Tensor)
