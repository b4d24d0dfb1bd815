"""Products with bfloat16 weights on a CPU, in C.

Half the bytes of float32, and a decoding step is the reading of its weights. Activations are rounded to bfloat16 as
everywhere with this dtype, but every sum is one of floats. Processors with AVX512-BF16 multiply pairs of columns
(dot_product.c), others floats that weights are widened to (product.c).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.compiler import CompiledProduct, Parts, compile_product

SOURCE = Path(__file__).with_name("dot_product.c" if torch.cpu._is_avx512_bf16_supported() else "product.c")
PANEL = 16
"""Outputs whose weights lie together."""


@dataclass(frozen=True, slots=True)
class Panels:
    """A weight [outputs, in]: ``words`` [panels, in / 2, PANEL, 2], the last panel filled up with zeros."""

    words: Tensor
    outputs: int

    @property
    def inputs(self) -> int:
        return 2 * self.words.shape[1]


def to_panels(weight: Tensor) -> Panels | None:
    """bfloat16 [out, in] on the CPU for ``multiply``; None where it cannot be."""
    outputs, inputs = weight.shape
    if inputs % 2 or _product() is None:
        return None
    filled = F.pad(weight, (0, 0, 0, -outputs % PANEL))
    return Panels(filled.view(-1, PANEL, inputs // 2, 2).transpose(1, 2).contiguous(), outputs)


def from_panels(panels: Panels) -> Tensor:
    """[out, in] again."""
    words = panels.words
    return words.transpose(1, 2).reshape(-1, 2 * words.shape[1])[: panels.outputs].contiguous()


def multiply(x: Tensor, panels: Panels) -> Tensor:
    """bfloat16 [rows, in] → [rows, out], rows >= 0; a row's bits do not depend on how many there are."""
    found = _product()
    assert found is not None, "there would be no panels"
    x, (rows, inputs) = x.contiguous(), x.shape
    assert (x.dtype, inputs) == (torch.bfloat16, panels.inputs), "C reads and writes by these"
    taken, out = torch.empty(rows * room(panels), dtype=torch.uint8), x.new_empty(rows, panels.outputs)
    words, given = panels.words.data_ptr(), out.data_ptr()
    found.multiply(x.data_ptr(), taken.data_ptr(), words, None, given, rows, inputs, panels.outputs)
    return out


def room(panels: Panels) -> int:
    """Bytes that a row needs beside it: itself as floats, where the product reads it so."""
    return 0 if parts().prepare is None else 4 * panels.inputs


def parts() -> Parts:
    """The product in C, for what it is called by there."""
    found = _product()
    assert found is not None, "there would be no panels"
    return found.parts


def multiplies() -> bool:
    """Whether there can be panels here."""
    return _product() is not None


@cache
def _product() -> CompiledProduct | None:
    return compile_product(SOURCE, {"PANEL": PANEL})
