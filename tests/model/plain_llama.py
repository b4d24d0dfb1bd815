"""Llama as the paper writes it: one sequence, no cache, no fusion, no batching. The oracle for the fast one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.model.config import LlamaConfig


def plain_logits(config: LlamaConfig, w: Mapping[str, Tensor], token_ids: Sequence[int]) -> Tensor:
    """[len(token_ids), vocab]."""
    embedding = w["model.embed_tokens.weight"]
    x = embedding[list(token_ids)]
    n, g = len(token_ids), config.group_size
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}."
        h = _norm(x, w[prefix + "input_layernorm.weight"], config.rms_norm_eps)
        q, k, v = (
            (h @ w[f"{prefix}self_attn.{name}_proj.weight"].T).view(n, -1, config.head_dim).transpose(0, 1)
            for name in "qkv"
        )
        q, k = _rotate(q, config), _rotate(k, config).repeat_interleave(g, 0)
        scores = q @ k.transpose(1, 2) / config.head_dim**0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        out = scores.softmax(-1) @ v.repeat_interleave(g, 0)
        x = x + out.transpose(0, 1).reshape(n, -1) @ w[prefix + "self_attn.o_proj.weight"].T
        h = _norm(x, w[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = h @ w[prefix + "mlp.gate_proj.weight"].T, h @ w[prefix + "mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[prefix + "mlp.down_proj.weight"].T
    head = embedding if config.tie_embeddings else w["lm_head.weight"]
    return _norm(x, w["model.norm.weight"], config.rms_norm_eps) @ head.T


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def _rotate(x: Tensor, config: LlamaConfig) -> Tensor:
    """Each pair (x[i], x[i + hd/2]) turned by position * theta^(-2i/hd)."""
    half = config.head_dim // 2
    angle = torch.outer(
        torch.arange(x.shape[1], dtype=x.dtype), config.rope_theta ** (-torch.arange(half, dtype=x.dtype) / half)
    )
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
