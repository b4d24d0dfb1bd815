"""``x @ weight.T`` for the few rows of a decoding step, where layout and order of the product decide the speed.

In float32 on a CPU, BLAS reads the weights at full bandwidth when they are the left factor, and at down to a quarter
of it when they are the right one. Linear layers of SmolLM2-135M, two cores of an AMD EPYC, MKL 2024.2, milliseconds:

    rows              1    2    3    4    5    8   10   12   16   32   64
    F.linear         40   68   88   63   67   64   87   76   79  111  160
    (W @ x.T).T      40   17   25   25   32   41   65   73   59   85  144

One row goes to a matrix-vector kernel that is slower than two rows through this one, and 10 to 15 rows cost more than
16; so these are filled up.

In bfloat16 there is a product of our own on every CPU with a C compiler (product.py), and one for weights in int8
(int8.py). Without a compiler oneDNN multiplies where the processor can; it lays the weights out anew at every call,
unless they are in its own layout already (docs/log.md). All three have a property that torch's other products lack, but
for oneDNN with a single row: a row's result does not depend on how many rows there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.contracts import SlipstreamError
from engine.model.int8 import Int8Panels, from_int8_panels, multiply_int8, to_int8, to_int8_panels
from engine.model.product import Panels, from_panels, multiply, to_panels

_MOST_ROWS = 64
_FILL = {1: 2} | dict.fromkeys(range(10, 16), 16)
_PACKED_FOR = 8
"""Rows that the layout is chosen for."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A bfloat16 weight [out, in] in oneDNN's layout."""

    opaque: Tensor


Weight = Tensor | Packed | Panels | Int8Panels


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model holds its matrices. With ``int8`` their values are rounded, whatever they are held in."""

    dtype: torch.dtype
    kernels: bool = True
    int8: bool = False

    def plain(self, weight: Tensor) -> Tensor:
        """``weight`` as an ordinary tensor of ``dtype``."""
        return (to_int8(weight).dense() if self.int8 else weight).to(self.dtype)

    def panels(self, weight: Tensor) -> Int8Panels | None:
        """``weight`` as bytes; None where it is not rounded, or the processor multiplies bfloat16, which is faster for
        many rows and was never measured against it for few."""
        if not (self.int8 and self.kernels and self.dtype == torch.bfloat16 and weight.device.type == "cpu"):
            return None
        return None if multiplies_bfloat16() else to_int8_panels(to_int8(weight))

    def packed(self, weight: Tensor) -> Weight:
        """``weight`` as ``linear`` is fastest with."""
        return self.panels(weight) or pack(self.plain(weight), self.kernels)


def pack(weight: Tensor, kernels: bool = True) -> Weight:
    """``weight`` in the layout that ``linear`` is fastest with on this device; itself where that is the plain one.

    ``kernels``: whether products may be our own, compiled here (product.py).
    """
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return weight
    if kernels and (panels := to_panels(weight)) is not None:
        return panels
    if multiplies_bfloat16():
        return Packed(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR))
    return weight


def dense(weight: Weight) -> Tensor:
    """[out, in] as an ordinary tensor."""
    if isinstance(weight, Panels):
        return from_panels(weight)
    if isinstance(weight, Int8Panels):
        return from_int8_panels(weight).dense().bfloat16()
    return weight.opaque.to_dense() if isinstance(weight, Packed) else weight


def copy_in_place(own: Mapping[str, Weight], given: Mapping[str, Weight], what: str) -> None:
    """Copy ``given`` into the storage of ``own``. SlipstreamError, before anything is copied, where they differ.

    Weights in a layout of their own are refused: they are nobody's to write, and no graph holds them.
    """
    problems = [f"{name} is missing" for name in sorted(own.keys() - given.keys())]
    problems += [f"{name} is unknown" for name in sorted(given.keys() - own.keys())]
    pairs: list[tuple[Tensor, Tensor]] = []
    for name in sorted(own.keys() & given.keys()):
        old, new = own[name], given[name]
        if not (isinstance(old, Tensor) and isinstance(new, Tensor)):
            problems.append(f"{name} is in a layout of its own")
        elif old.shape != new.shape:
            problems.append(f"{name} has shape {list(new.shape)}, not {list(old.shape)}")
        else:
            pairs.append((old, new))
    if problems:
        raise SlipstreamError(f"{what} cannot take these weights in place: {'; '.join(problems)}. Load it anew.")
    for old, new in pairs:
        old.copy_(new)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """[rows, in] and [out, in] → [rows, out], contiguous."""
    if isinstance(weight, Panels):
        return multiply(x, weight)
    if isinstance(weight, Int8Panels):
        return multiply_int8(x, weight)
    if isinstance(weight, Packed):
        single = x.shape[0] == 1  # has a kernel of its own, which rounds otherwise
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            F.pad(x, (0, 0, 0, 1)) if single else x, weight.opaque, None, "none", [], ""
        )
        return product[:1] if single else product
    rows = x.shape[0]
    if rows > _MOST_ROWS or x.dtype != torch.float32 or x.device.type != "cpu":
        return F.linear(x, weight)
    filled = _FILL.get(rows, rows)
    if filled != rows:
        x = F.pad(x, (0, 0, 0, filled - rows))
    return (weight @ x.t())[:, :rows].t().contiguous()


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor does, and this build has the operators that torch's compiler uses for packed weights."""
    ops = torch.ops.mkldnn
    has = (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported)
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(ops, "_reorder_linear_weight")
        and hasattr(ops, "_linear_pointwise")
        and bool(ops._is_mkldnn_bf16_supported())
        and any(ask() for ask in has)
    )
