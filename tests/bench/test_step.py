"""The benchmark of a step, whole, on shapes that take milliseconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.bench import step
from engine.bench.step import Options
from engine.contracts import SlipstreamError
from engine.model.draft import DraftNetwork
from engine.model.llama import Llama, tensor_shapes
from engine.model.random_weights import TINY, random_llama
from engine.settings import load_settings
from tests.model.tape import Tape
from tests.tiny_model import write_tiny_model

SMALL = Options(("own", "tiny"), (1, 2), (0, 3), 20, 5)


def test_it_prints_a_step_against_its_floor_for_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path / "model")
    monkeypatch.setitem(step.COPIED_BYTES, "cpu", 2**16)
    flags = [f"home={tmp_path}", f"engine.model={tmp_path / 'model'}", "engine.dtype=float32", "engine.device=cpu"]
    report = step.run(load_settings(flags=flags), SMALL, lambda line: None)
    figures = {figure.name: figure for figure in report.figures}
    for shape in ("own", "tiny"):
        floor = figures[f"floor_ms:{shape}"].value
        for size in ("1x1", "1x4", "2x1", "2x4"):
            took, over = figures[f"step_ms:{shape}:{size}:eager"], figures[f"ratio:step/floor:{shape}:{size}:eager"]
            assert took.n == over.n == SMALL.repeats
            assert over.value == pytest.approx(took.value / floor)
        assert {f"swap_ms:{shape}:draft", f"swap_ms:{shape}:target"} <= figures.keys()
    assert not any("captured" in name for name in figures), "nothing is captured on a CPU"


def test_a_floor_counts_every_weight_once() -> None:
    untied = random_llama(TINY)
    all_of_it = sum(t.numel() for t in (untied.embedding, untied.norm, untied.head))
    all_of_it += sum(w.numel() for layer in untied.layers for w in layer.weights().values())  # type: ignore[union-attr]
    assert step.weight_bytes(untied) == 8 * (all_of_it - untied.embedding.numel())
    tied = random_llama(replace(TINY, tie_embeddings=True))
    assert step.weight_bytes(tied) == step.weight_bytes(untied)
    assert len(tensor_shapes(tied.config)) == len(tensor_shapes(untied.config)) - 1


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(SlipstreamError, match=r"no shapes \['70b'\]"):
        step.run(load_settings(), Options(("70b",)), lambda line: None)


def swaps(model: Llama) -> list[str]:
    steps = step._Steps("tiny", model, 1.0, SMALL, np.random.default_rng(0), lambda line: None, Tape())
    return [figure.name for figure in steps._swaps()]


def test_after_a_swap_captured_passes_answer_by_the_new_weights() -> None:
    assert swaps(random_llama(TINY)) == ["swap_ms:tiny:draft", "swap_ms:tiny:target"]


@pytest.mark.parametrize("what", ["target", "draft"])
def test_a_swap_that_captured_passes_do_not_see_is_an_error(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: new tensors in place of the old instead of in their storage."""

    def rebind_target(self: Llama, tensors: dict[str, torch.Tensor]) -> None:
        self.__dict__.update(Llama.from_checkpoint(self.config, tensors, self.dtype, self.device).__dict__)

    def rebind_draft(self: DraftNetwork, weights: dict[str, torch.Tensor], vocabulary: torch.Tensor) -> None:
        self.__dict__.update(DraftNetwork(self.config, weights, vocabulary, self.target).__dict__)

    kind, rebind = (Llama, rebind_target) if what == "target" else (DraftNetwork, rebind_draft)
    monkeypatch.setattr(kind, "copy_weights", torch.inference_mode()(rebind))
    with pytest.raises(SlipstreamError, match=f"captured passes of the {what} do not answer"):
        swaps(random_llama(TINY))
