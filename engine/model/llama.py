"""Llama for inference on flat tokens.

Linear layers see exactly the tokens of the step, [num_tokens, hidden], without padding; only attention knows which
token belongs to which sequence. Query, key and value share one projection, gate and up another. The query heads of a
kv head are folded into the rows of attention, so keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.contracts import SlipstreamError
from engine.model.batch import Batch, DecodeGroup, PrefillGroup
from engine.model.config import LlamaConfig
from engine.model.kv_cache import KVCache
from engine.model.linear import linear


class Layer:
    """One decoder layer, fused: ``qkv`` [(heads + 2 kv_heads) * head_dim, hidden], ``gate_up`` [2 inter, hidden]."""

    __slots__ = ("attention_norm", "down", "gate_up", "mlp_norm", "out", "qkv")

    def __init__(self, take: Mapping[str, Tensor], index: int) -> None:
        prefix = f"model.layers.{index}."
        self.attention_norm = take[prefix + "input_layernorm.weight"]
        self.mlp_norm = take[prefix + "post_attention_layernorm.weight"]
        self.qkv = torch.cat([take[f"{prefix}self_attn.{x}_proj.weight"] for x in "qkv"])
        self.out = take[prefix + "self_attn.o_proj.weight"]
        self.gate_up = torch.cat([take[f"{prefix}mlp.{x}_proj.weight"] for x in ("gate", "up")])
        self.down = take[prefix + "mlp.down_proj.weight"]


class Llama:
    def __init__(self, config: LlamaConfig, tensors: Mapping[str, Tensor]) -> None:
        """``tensors`` under their Hugging Face names, checked by ``from_checkpoint``."""
        self.config = config
        self.embedding = tensors["model.embed_tokens.weight"]  # [vocab, hidden]
        self.norm = tensors["model.norm.weight"]
        self.head = self.embedding if config.tie_embeddings else tensors["lm_head.weight"]  # [vocab, hidden]
        self.layers = [Layer(tensors, i) for i in range(config.num_layers)]
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.cos, self.sin = _rope_tables(config, self.dtype, self.device)

    @classmethod
    def from_checkpoint(
        cls, config: LlamaConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> Llama:
        """Strict: a missing, unexpected or misshapen tensor is an error with its name."""
        shapes = tensor_shapes(config)
        # Tied checkpoints may carry the head again, and old ones the rotary frequencies; both are derived data.
        derived = {"lm_head.weight"} if config.tie_embeddings else set()
        found = {n: t for n, t in tensors.items() if n not in derived and not n.endswith("rotary_emb.inv_freq")}
        problems = [f"missing {name}" for name in sorted(set(shapes) - set(found))]
        problems += [f"unexpected {name}" for name in sorted(set(found) - set(shapes))]
        problems += [
            f"{name} has shape {list(found[name].shape)}, not {list(shapes[name])}"
            for name in sorted(set(found) & set(shapes))
            if tuple(found[name].shape) != shapes[name]
        ]
        if problems:
            more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise SlipstreamError(f"The weights do not fit config.json: {'; '.join(problems[:8])}{more}.")
        return cls(config, {name: tensor.to(device, dtype) for name, tensor in found.items()})

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [num_tokens, hidden] before the last norm; keys and values go into ``cache``."""
        config, eps = self.config, self.config.rms_norm_eps
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        num_tokens = batch.token_ids.shape[0]
        cos, sin = self.cos[batch.positions].unsqueeze(1), self.sin[batch.positions].unsqueeze(1)  # [N, 1, hd]
        x = F.embedding(batch.token_ids, self.embedding)
        for i, layer in enumerate(self.layers):
            h = F.rms_norm(x, (config.hidden_size,), layer.attention_norm, eps)
            qkv = linear(h, layer.qkv).view(num_tokens, heads + 2 * kv_heads, dim)
            qk, value = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
            qk = torch.addcmul(qk * cos, qk.roll(dim // 2, -1), sin)  # query and key rotated together
            cache.write(i, batch.places, qk[:, heads:], value)
            x = x + linear(self._attend(i, qk[:, :heads], batch, cache), layer.out)
            h = F.rms_norm(x, (config.hidden_size,), layer.mlp_norm, eps)
            gate, up = linear(h, layer.gate_up).chunk(2, -1)
            x = x + linear(F.silu(gate).mul_(up), layer.down)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocab] from rows of ``forward``."""
        return linear(F.rms_norm(hidden, (self.config.hidden_size,), self.norm, self.config.rms_norm_eps), self.head)

    def _attend(self, layer: int, query: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """[N, heads, hd] → [N, heads * hd]."""
        parts = []
        if batch.decode is not None:
            parts.append(self._attend_decode(layer, query[: batch.decode.num_tokens], batch.decode, cache))
        parts += [self._attend_prefill(layer, query[g.first : g.last], g, cache) for g in batch.prefills]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_decode(self, layer: int, query: Tensor, group: DecodeGroup, cache: KVCache) -> Tensor:
        kv_heads, g, dim = self.config.num_kv_heads, self.config.group_size, self.config.head_dim
        rows, width = group.rows, group.width
        if group.pad is not None:
            query = query.new_zeros(rows * width, kv_heads * g, dim).index_copy_(0, group.pad, query)
        query = query.reshape(rows, width, kv_heads, g, dim).transpose(1, 2).reshape(rows, kv_heads, width * g, dim)
        key, value = cache.rows(layer, 0, rows, group.length)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=group.mask)
        out = out.view(rows, kv_heads, width, g, dim).transpose(1, 2).reshape(rows * width, kv_heads * g * dim)
        return out if group.pad is None else out[group.pad]

    def _attend_prefill(self, layer: int, query: Tensor, group: PrefillGroup, cache: KVCache) -> Tensor:
        kv_heads, g, dim = self.config.num_kv_heads, self.config.group_size, self.config.head_dim
        count = group.last - group.first
        query = query.reshape(count, kv_heads, g, dim).transpose(0, 1).reshape(1, kv_heads, count * g, dim)
        key, value = cache.rows(layer, group.slot, group.slot + 1, group.length)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=group.mask)
        return out.view(kv_heads, count, g, dim).transpose(0, 1).reshape(count, kv_heads * g * dim)


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a checkpoint (Hugging Face names)."""
    hidden, inter = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inter, hidden),
        "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{i}.{name}.weight": shape for i in range(config.num_layers) for name, shape in inner.items()
    }
    shapes |= {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _rope_tables(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and signed sin [max_position, hd]; x * cos + roll(x, hd/2) * sin rotates the halves of x (RoFormer).

    rotate_half(x) is (-x2, x1) and roll gives (x2, x1): the sign lives in the table.
    """
    half = config.head_dim // 2
    frequency = config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(config.max_position, dtype=torch.float64), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).to(device, dtype), torch.cat([-sin, sin], -1).to(device, dtype)
