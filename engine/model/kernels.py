"""``ops.Ops`` in C, for bfloat16 on a CPU: compiled at start for the model's shape, in about a second.

Without a C compiler, or for a shape that they do not know, there is torch.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import torch
from torch import Tensor

from engine.model.attention import attend_alone
from engine.model.batch import Batch
from engine.model.compiler import COUNT, POINTER, REAL, compile_c, function
from engine.model.config import LlamaConfig
from engine.model.kv_cache import KVCache
from engine.model.ops import Turns

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("kernels.c")
LANES = 16


def compile_kernels(config: LlamaConfig, cos: Tensor, sin: Tensor) -> KernelOps | None:
    """The kernels for a model whose weights are like ``cos`` in dtype and device; None, with the reason in the log."""
    if cos.dtype != torch.bfloat16 or cos.device.type != "cpu":
        return None
    if (
        config.qk_norm
        or config.head_dim % (2 * LANES)
        or config.hidden_size % LANES
        or config.intermediate_size % LANES
    ):
        log.info("no kernels for a model of this shape: torch runs between its matrix products")
        return None
    shape = {"HEAD_DIM": config.head_dim, "GROUP": config.group_size}
    return compile_c(SOURCE, shape, lambda library: KernelOps(library, config, cos, sin))


class KernelOps:
    def __init__(self, library: Path, config: LlamaConfig, cos: Tensor, sin: Tensor) -> None:
        """``library`` may be deleted afterwards. OSError or AttributeError when it is not what ``kernels.c`` makes."""
        quick = ctypes.PyDLL(str(library))  # microseconds: not worth handing the interpreter to another thread
        self._add_rms_norm = function(quick.add_rms_norm, *[POINTER] * 4, COUNT, COUNT, REAL)
        self._silu_mul = function(quick.silu_mul, POINTER, POINTER, COUNT, COUNT)
        self._rotate_and_write = function(quick.rotate_and_write, *[POINTER] * 7, *[COUNT] * 3)
        self._attend = function(ctypes.CDLL(str(library)).attend, *[POINTER] * 6, *[COUNT] * 3)
        self._config, self._tables = config, (cos, sin)

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        out, (rows, width) = torch.empty_like(x), x.shape
        added = None if y is None else y.data_ptr()
        eps = self._config.rms_norm_eps
        self._add_rms_norm(x.data_ptr(), added, weight.data_ptr(), out.data_ptr(), rows, width, eps)
        return x, out

    def turns(self, positions: Tensor) -> Turns:
        return self._tables

    def attend(
        self, layer: int, qkv: Tensor, qk_norm: Tensor | None, turns: Turns, batch: Batch, cache: KVCache
    ) -> Tensor:
        heads, kv_heads, dim = self._config.num_heads, self._config.num_kv_heads, self._config.head_dim
        positions, places = batch.positions.data_ptr(), batch.places.data_ptr()
        keys, values, n = cache.keys[layer].data_ptr(), cache.values[layer].data_ptr(), qkv.shape[0]
        at, (cos, sin) = qkv.data_ptr(), turns
        self._rotate_and_write(at, cos.data_ptr(), sin.data_ptr(), positions, places, keys, values, n, heads, kv_heads)
        out = qkv.new_empty(n, heads * dim)
        self._attend(at, keys, values, positions, places, out.data_ptr(), 0, batch.num_decode, kv_heads)
        if batch.repeated:
            out[1:] = out[0]
        query = qkv.view(n, -1, dim)[:, :heads]
        for group in batch.prefills:  # long, so that matrix products pay there too
            out[group.first : group.last] = attend_alone(layer, query[group.first : group.last], group, cache)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape
        out = gate_up.new_empty(rows, width // 2)
        self._silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, width // 2)
        return out
