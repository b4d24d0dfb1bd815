"""Keys and values of all running sequences, one row of positions per slot.

Layout [layers, slots, max_len, kv_heads, head_dim]: a write is one ``index_copy_`` at flat places, and reading the
first rows up to the longest length is a view. Slots in use are the lowest ones (the scheduler hands out the lowest
free slot), so a batch of decode rows reads ``cache[:B, :L]`` without gathering. Rows in between that are not in the
batch are computed and dropped: cheaper than copying keys and values together.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_SPARE = 16
"""Places beyond the slots. One is used; so many keep every layer's storage aligned."""


class CacheShape(Protocol):
    """What of a model's configuration decides the size of its cache."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class KVCache:
    def __init__(
        self, config: CacheShape, num_slots: int, max_len: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.num_slots, self.max_len = num_slots, max_len
        self.nowhere = num_slots * max_len
        """A place that belongs to no slot and that nobody reads: padding is written there."""
        slots = (num_slots, max_len, config.num_kv_heads, config.head_dim)
        shape = (2, config.num_layers, self.nowhere + _SPARE, config.num_kv_heads, config.head_dim)
        storage = _zeros(shape, dtype, torch.device(device))
        self.flat_keys, self.flat_values = storage[0].unbind(0), storage[1].unbind(0)
        self.keys = [flat[: self.nowhere].view(slots) for flat in self.flat_keys]  # per layer
        self.values = [flat[: self.nowhere].view(slots) for flat in self.flat_values]

    def write(self, layer: int, places: Tensor, key: Tensor, value: Tensor) -> None:
        """Store ``key`` and ``value`` [N, kv_heads, head_dim] at ``places`` [N] = slot * max_len + position."""
        self.flat_keys[layer].index_copy_(0, places, key)
        self.flat_values[layer].index_copy_(0, places, value)

    def rows(self, layer: int, first: int, last: int, length: int) -> tuple[Tensor, Tensor]:
        """Views of slots ``first`` to ``last`` (exclusive): two of [last - first, kv_heads, length, head_dim]."""
        key = self.keys[layer][first:last, :length].transpose(1, 2)
        value = self.values[layer][first:last, :length].transpose(1, 2)
        return key, value


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, for a masked NaN would still poison a softmax sum.

    On the CPU from numpy, whose zeros are pages that the kernel hands out when first written: a cache for 16 × 2,048
    tokens takes memory as it fills, not at once.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, np.uint8)).view(dtype).view(shape)
