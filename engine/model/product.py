"""Products with bfloat16 weights on processors that do not multiply bfloat16, in C.

Half the bytes of float32, and a decoding step is the reading of its weights. Activations are rounded to bfloat16 as
everywhere with this dtype, but every sum is one of floats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.compiler import COUNT, POINTER, compile_function

SOURCE = Path(__file__).with_name("product.c")
PANEL = 16
"""Outputs whose weights lie together."""


@dataclass(frozen=True, slots=True)
class Panels:
    """A weight [outputs, in]: ``words`` [panels, in / 2, PANEL, 2], the last panel filled up with zeros."""

    words: Tensor
    outputs: int


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
    product = _product()
    assert product is not None, "there would be no panels"
    x, (rows, inputs) = x.contiguous(), x.shape
    wide, out = x.new_empty(rows, inputs, dtype=torch.float32), x.new_empty(rows, panels.outputs)
    pointers = (tensor.data_ptr() for tensor in (x, wide, panels.words, out))
    product(*pointers, rows, inputs, panels.outputs)
    return out


def multiplies() -> bool:
    """Whether there can be panels here."""
    return _product() is not None


@cache
def _product() -> Callable[..., None] | None:
    return compile_function(SOURCE, "product", {"PANEL": PANEL}, *[POINTER] * 4, *[COUNT] * 3)
