"""Weights rounded to int8, GROUP inputs of an output to a scale, and products with them on a CPU, in C.

Half the bytes of bfloat16, and the products are of integers, two to an instruction. What it costs is the model: it is
another one, with a fingerprint of its own. Rounding is symmetric. GROUP was chosen by the divergence of the answers,
with scales in float32 (docs/log.md); here they are bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.compiler import CompiledProduct, Parts, compile_product
from engine.model.product import PANEL

SOURCE = Path(__file__).with_name("int8.c")
GROUP = 32
MOST = 127


@dataclass(frozen=True, slots=True)
class Int8:
    """A weight [outputs, inputs]: ``whole`` int8 [outputs, groups, GROUP], filled up with zeros, times ``scales``
    bfloat16 [outputs, groups]."""

    whole: Tensor
    scales: Tensor
    inputs: int

    def dense(self) -> Tensor:
        """float32 [outputs, inputs]."""
        return (self.whole * self.scales.float()[..., None]).flatten(1)[:, : self.inputs].contiguous()


@dataclass(frozen=True, slots=True)
class Int8Panels:
    """A weight [outputs, inputs]: ``words`` int8 [panels, groups * GROUP / 2, PANEL, 2], ``scales`` bfloat16
    [panels, groups, PANEL]; the last panel filled up with zeros."""

    words: Tensor
    scales: Tensor
    outputs: int
    inputs: int


def to_int8(weight: Tensor) -> Int8:
    """``weight`` [outputs, inputs] rounded. What is rounded already stays as it is."""
    groups = F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / MOST).bfloat16()
    whole = (groups / scales.float()[..., None]).nan_to_num(0.0).round().clamp(-MOST, MOST).to(torch.int8)
    return Int8(whole, scales, weight.shape[1])


def to_int8_panels(weight: Int8) -> Int8Panels | None:
    """For ``multiply_int8``, on the CPU; None without a C compiler."""
    if _product() is None:
        return None
    outputs = weight.scales.shape[0]
    filled = F.pad(weight.whole.flatten(1), (0, 0, 0, -outputs % PANEL))
    words = filled.view(-1, PANEL, filled.shape[1] // 2, 2).transpose(1, 2).contiguous()
    scales = F.pad(weight.scales, (0, 0, 0, -outputs % PANEL)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
    return Int8Panels(words, scales, outputs, weight.inputs)


def from_int8_panels(panels: Int8Panels) -> Int8:
    whole = panels.words.transpose(1, 2).flatten(2).flatten(0, 1)[: panels.outputs]
    scales = panels.scales.transpose(1, 2).flatten(0, 1)[: panels.outputs]
    return Int8(whole.unflatten(1, (-1, GROUP)), scales, panels.inputs)


def multiply_int8(x: Tensor, panels: Int8Panels) -> Tensor:
    """bfloat16 [rows, inputs] → [rows, outputs], rows >= 0; a row's bits do not depend on how many there are."""
    found = _product()
    assert found is not None, "there would be no panels"
    x, (rows, inputs) = x.contiguous(), x.shape
    assert (x.dtype, inputs) == (torch.bfloat16, panels.inputs), "C reads and writes by these"
    taken, out = torch.empty(rows * room(panels), dtype=torch.uint8), x.new_empty(rows, panels.outputs)
    pointers = (tensor.data_ptr() for tensor in (x, taken, panels.words, panels.scales, out))
    found.multiply(*pointers, rows, inputs, panels.outputs)
    return out


def room(panels: Int8Panels) -> int:
    """Bytes that a row needs beside it: itself as int16, and a scale in float32 to a group."""
    return panels.scales.shape[1] * (2 * GROUP + 4)


def parts() -> Parts:
    """The product in C, for what it is called by there."""
    found = _product()
    assert found is not None, "there would be no panels"
    return found.parts


@cache
def _product() -> CompiledProduct | None:
    return compile_product(SOURCE, {"PANEL": PANEL, "GROUP": GROUP})
