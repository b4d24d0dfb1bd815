"""Attention of one layer over the keys and values in a cache: decode rows together, long drafts and prompts alone.

The query heads of a kv head are folded into the rows of attention, so keys and values are never repeated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.batch import Batch, DecodeGroup, LoneGroup
from engine.model.kv_cache import KVCache
from engine.model.linear import multiplies_bfloat16


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [N, heads, hd] by ``cos`` and signed ``sin`` [N, 1, hd] (``rope_tables``)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rope_tables(
    theta: float, head_dim: int, max_position: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and signed sin [max_position, hd]; x * cos + roll(x, hd/2) * sin rotates the halves of x (RoFormer).

    rotate_half(x) is (-x2, x1) and roll gives (x2, x1): the sign lives in the table.
    """
    half = head_dim // 2
    frequency = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(max_position, dtype=torch.float64), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).to(device, dtype), torch.cat([-sin, sin], -1).to(device, dtype)


def attend(layer: int, query: Tensor, batch: Batch, cache: KVCache) -> Tensor:
    """[N, heads, hd] → [N, heads * hd]; keys and values of these tokens are in ``cache`` already."""
    decode = batch.decode
    if decode is not None and decode.num_tokens == query.shape[0]:
        return _attend_decode(layer, query, decode, cache)
    if decode is None and len(batch.lone) == 1 and not batch.prefills:
        return attend_alone(layer, query, batch.lone[0], cache)
    out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
    if decode is not None and decode.tokens is None:
        out[: decode.num_tokens] = _attend_decode(layer, query[: decode.num_tokens], decode, cache)
    elif decode is not None:
        out[decode.tokens] = _attend_decode(layer, query[decode.tokens], decode, cache)
    for group in (*batch.lone, *batch.prefills):
        out[group.first : group.last] = attend_alone(layer, query[group.first : group.last], group, cache)
    return out


def _attend_decode(layer: int, query: Tensor, group: DecodeGroup, cache: KVCache) -> Tensor:
    rows, width = group.rows, group.width
    key, value = cache.rows(layer, 0, rows, group.length)
    kv_heads, dim = key.shape[1], key.shape[-1]
    g = query.shape[1] // kv_heads
    if group.filled is not None:
        query = query.index_select(0, group.filled)
    query = query.reshape(rows, width, kv_heads, g, dim).transpose(1, 2).reshape(rows, kv_heads, width * g, dim)
    out = _weigh(query, key, value, group.mask)
    out = out.view(rows, kv_heads, width, g, dim).transpose(1, 2).reshape(rows * width, kv_heads * g * dim)
    return out if group.pad is None else out.index_select(0, group.pad)


def attend_alone(layer: int, query: Tensor, group: LoneGroup, cache: KVCache) -> Tensor:
    """[count, heads, hd] → [count, heads * hd] of one row."""
    key, value = cache.rows(layer, group.slot, group.slot + 1, group.length)
    kv_heads, dim = key.shape[1], key.shape[-1]
    g, count = query.shape[1] // kv_heads, group.last - group.first
    query = query.reshape(count, kv_heads, g, dim).transpose(0, 1).reshape(1, kv_heads, count * g, dim)
    out = _weigh(query, key, value, group.mask)
    return out.view(kv_heads, count, g, dim).transpose(0, 1).reshape(count, kv_heads * g * dim)


def _weigh(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot product attention, in floats where bfloat16 would be multiplied number by number."""
    if query.dtype != torch.bfloat16 or query.device.type != "cpu" or multiplies_bfloat16():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    wide = None if mask is None else mask.float()
    return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=wide).to(query.dtype)
