"""Llama for inference on flat tokens.

Linear layers see exactly the tokens of the step, [num_tokens, hidden], without padding; only attention knows which
token belongs to which sequence. Query, key and value share one projection, gate and up another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.contracts import SlipstreamError
from engine.model.attention import rope_tables
from engine.model.batch import Batch, Row, build_batch
from engine.model.config import LlamaConfig
from engine.model.kv_cache import KVCache
from engine.model.linear import Layout, Weight, copy_in_place, linear, pack
from engine.model.ops import Ops

if TYPE_CHECKING:
    from engine.model.kernels import Kernels


class Layer:
    """One decoder layer, fused: ``qkv`` [(heads + 2 kv_heads) * head_dim, hidden], ``gate_up`` [2 inter, hidden]."""

    __slots__ = ("attention_norm", "down", "gate_up", "mlp_norm", "out", "qk_norm", "qkv", "qkv_bias")

    def __init__(self, config: LlamaConfig, take: Mapping[str, Tensor], index: int, layout: Layout) -> None:
        prefix = f"model.layers.{index}."
        self.attention_norm = take[prefix + "input_layernorm.weight"]
        self.mlp_norm = take[prefix + "post_attention_layernorm.weight"]
        self.qkv = layout.packed(torch.cat([take[f"{prefix}self_attn.{x}_proj.weight"] for x in "qkv"]))
        self.qkv_bias, self.qk_norm = None, None
        if config.qkv_bias:
            self.qkv_bias = torch.cat([take[f"{prefix}self_attn.{x}_proj.bias"] for x in "qkv"])
        if config.qk_norm:
            counts = {"q": config.num_heads, "k": config.num_kv_heads}
            norms = [take[f"{prefix}self_attn.{x}_norm.weight"].expand(n, -1) for x, n in counts.items()]
            self.qk_norm = torch.cat(norms)  # [heads + kv_heads, head_dim]
        self.out = layout.packed(take[prefix + "self_attn.o_proj.weight"])
        self.gate_up = layout.packed(torch.cat([take[f"{prefix}mlp.{x}_proj.weight"] for x in ("gate", "up")]))
        self.down = layout.packed(take[prefix + "mlp.down_proj.weight"])

    def weights(self) -> dict[str, Weight]:
        return {name: weight for name in self.__slots__ if (weight := getattr(self, name)) is not None}


class Llama:
    def __init__(self, config: LlamaConfig, tensors: Mapping[str, Tensor], layout: Layout) -> None:
        """``tensors`` under their Hugging Face names, checked by ``from_checkpoint``; vectors in the layout's dtype."""
        self.config, self.layout = config, layout
        self.embedding = layout.plain(tensors["model.embed_tokens.weight"])  # [vocab, hidden]
        self.norm = tensors["model.norm.weight"]
        head = tensors["model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"]
        self.head = self.embedding if config.tie_embeddings else layout.plain(head)  # [vocab, hidden]
        self._head = layout.panels(head) or pack(self.head, layout.kernels)
        self.layers = [Layer(config, tensors, i, layout) for i in range(config.num_layers)]
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.cos, self.sin = rope_tables(
            config.rope_theta, config.head_dim, config.max_position, self.dtype, self.device
        )
        self._ops = Ops(config, self.cos, self.sin)
        self.kernels: Kernels | None = None  # given by whoever compiles them (kernels.py)

    @classmethod
    def from_checkpoint(
        cls,
        config: LlamaConfig,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        kernels: bool = True,
        int8: bool = False,
    ) -> Llama:
        """Strict: a missing, unexpected or misshapen tensor is an error with its name.

        ``kernels`` as of ``pack``; ``int8``: all matrices rounded (``int8.py``), whatever they are held in.
        """
        layout = Layout(dtype, kernels, int8)
        found = {name: _given(tensor, layout, device) for name, tensor in _fitting(config, tensors).items()}
        return cls(config, found, layout)

    @torch.inference_mode()
    def copy_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Take another checkpoint of this shape, in the same storage: what was captured goes on with the new weights.

        Strict as ``from_checkpoint``, and nothing is changed where something does not fit. Keys and values computed
        before are the old weights', and drafts keep the head's rows they took: begin both anew.
        """
        found = _fitting(self.config, tensors)

        def here(prefix: str) -> dict[str, Tensor]:
            """A part at a time, so that no second model lies beside this one."""
            return {n: _given(t, self.layout, self.device) for n, t in found.items() if n.startswith(prefix)}

        plain = self.layout.plain
        embedding = plain(here("model.embed_tokens.weight")["model.embed_tokens.weight"])
        head = embedding if self.config.tie_embeddings else plain(here("lm_head.weight")["lm_head.weight"])
        own: dict[str, Weight] = {"head": self._head, "embedding": self.embedding, "norm": self.norm}
        given = {"head": head, "embedding": embedding, "norm": found["model.norm.weight"]}
        copy_in_place(own, given, "The target")
        for i, layer in enumerate(self.layers):
            fresh = Layer(self.config, here(f"model.layers.{i}."), i, self.layout)
            copy_in_place(layer.weights(), fresh.weights(), "The target")

    def lay_out(self, decodes: Sequence[Row], prefills: Sequence[Row], max_len: int) -> Batch:
        """Rows of one pass over a cache of ``max_len``, as the layers read them."""
        grouped = self.kernels is None
        return build_batch(decodes, prefills, max_len, self.config.group_size, self.dtype, self.device, grouped)

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [num_tokens, hidden] before the last norm; keys and values go into ``cache``."""
        return self.forward_with_aux(batch, cache, ())[0]

    @torch.inference_mode()
    def forward_with_aux(
        self, batch: Batch, cache: KVCache, aux_layers: Sequence[int], depth: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``forward``, and what the layers ``aux_layers`` gave out, [num_tokens, len(aux_layers) * hidden].

        ``depth``: layers that are computed, the first ones; the hidden states are then those after the last of them.
        """
        x = F.embedding(batch.token_ids, self.embedding)
        layers = self.layers[:depth]
        if self.kernels is not None:
            return self.kernels.forward(x, batch, cache, aux_layers, len(layers))
        ops, turns, y = self._ops, self._ops.turns(batch.positions), None
        outputs: dict[int, Tensor] = {}
        for i, layer in enumerate(layers):
            x, h = ops.add_norm(x, y, layer.attention_norm)
            if i - 1 in aux_layers:
                outputs[i - 1] = x
            qkv = linear(h, layer.qkv)
            if layer.qkv_bias is not None:
                qkv = qkv + layer.qkv_bias
            attended = ops.attend(i, qkv, layer.qk_norm, turns, batch, cache)
            x, h = ops.add_norm(x, linear(attended, layer.out), layer.mlp_norm)
            y = linear(ops.silu_mul(linear(h, layer.gate_up)), layer.down)
        x = x if y is None else x + y
        outputs[len(layers) - 1] = x
        return x, torch.cat([outputs[i] for i in aux_layers], -1) if aux_layers else None

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocab] from rows of ``forward``."""
        return linear(self.normed(hidden), self._head)

    def normed(self, hidden: Tensor) -> Tensor:
        """What the head is applied to, [rows, hidden]."""
        return F.rms_norm(hidden, (self.config.hidden_size,), self.norm, self.config.rms_norm_eps)


def _given(tensor: Tensor, layout: Layout, device: torch.device) -> Tensor:
    """In the layout's dtype, but for what is to be rounded to int8: once, from what the checkpoint says."""
    return tensor.to(device) if layout.int8 and tensor.ndim == 2 else tensor.to(device, layout.dtype)


def _fitting(config: LlamaConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of ``tensors`` that the model is made of; a SlipstreamError with the names of all that do not fit."""
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
    return found


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a checkpoint (Hugging Face names)."""
    hidden, inter = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner: dict[str, tuple[int, ...]] = {
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
    inner = {f"{name}.weight": shape for name, shape in inner.items()}
    if config.qkv_bias:
        inner |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if config.qk_norm:
        inner |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{i}.{name}": shape for i in range(config.num_layers) for name, shape in inner.items()
    }
    shapes |= {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes
