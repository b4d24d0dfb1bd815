"""What stands between the matrix products of a layer, in torch: for every device, dtype and model of the family.

``kernels.py`` runs whole layers in C for bfloat16 on a CPU, where calling torch costs more than computing.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engine.model.attention import attend, rotate
from engine.model.batch import Batch
from engine.model.config import LlamaConfig
from engine.model.kv_cache import KVCache

Turns = tuple[Tensor, Tensor]


class Ops:
    def __init__(self, config: LlamaConfig, cos: Tensor, sin: Tensor) -> None:
        self._config, self._tables = config, (cos, sin)

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(x + y, its RMS norm) of [N, hidden]."""
        x = x if y is None else x + y
        return x, F.rms_norm(x, (self._config.hidden_size,), weight, self._config.rms_norm_eps)

    def turns(self, positions: Tensor) -> Turns:
        """What rotates queries and keys at ``positions`` [N], for ``attend`` in all layers of a pass."""
        cos, sin = self._tables
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)  # [N, 1, hd]

    def attend(
        self, layer: int, qkv: Tensor, qk_norm: Tensor | None, turns: Turns, batch: Batch, cache: KVCache
    ) -> Tensor:
        """[N, (heads + 2 kv_heads) * head_dim] → [N, heads * head_dim]; keys and values go into ``cache``."""
        config = self._config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = qkv.view(-1, heads + 2 * kv_heads, dim)
        qk, value = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if qk_norm is not None:
            qk = F.rms_norm(qk, (dim,), None, config.rms_norm_eps) * qk_norm
        qk = rotate(qk, *turns)  # query and key together
        cache.write(layer, batch.places, qk[:, heads:], value)
        return attend(layer, qk[:, :heads], batch, cache)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[N, 2 * inter] → [N, inter]."""
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)
