"""The neural draft: one decoder layer in the shape of EAGLE-3 (Li et al. 2025, arXiv 2503.01840).

Slot i pairs the token x[i+1] with what the target said at position i, and predicts x[i+2]: the draft always knows one
token more than the hidden states do. Three layers' outputs of the target, low, middle and high, are fused into the
slot's hidden state; slots beyond the last verified token take the draft's own output of the slot before instead.

Embedding and head are the target's own. The draft answers in a vocabulary of its own, a sorted selection of the
target's ids, whose head rows are taken from the target when it is bound: the head is most of a draft step's cost, and
what is not learned need not be stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.contracts import SlipstreamError
from engine.model.attention import attend, rotate
from engine.model.batch import Batch
from engine.model.config import LlamaConfig
from engine.model.kv_cache import KVCache
from engine.model.linear import copy_in_place, linear, pack
from engine.model.llama import Llama

NUM_AUX = 3


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """The draft's shape. ``vocab_size`` is its own vocabulary, ``aux_layers`` the layers of the target it reads."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    aux_layers: tuple[int, int, int]

    @classmethod
    def of_target(cls, target: LlamaConfig, vocab_size: int) -> DraftConfig:
        """A layer like the target's own, over the outputs of its layers 1, L/2 - 1 and L - 4."""
        last = target.num_layers - 1
        low, middle, high = (min(max(i, 0), last) for i in (1, target.num_layers // 2 - 1, target.num_layers - 4))
        return cls(
            vocab_size,
            target.hidden_size,
            target.intermediate_size,
            target.num_heads,
            target.num_kv_heads,
            target.head_dim,
            (low, middle, high),
        )

    @classmethod
    def from_json(cls, tree: object) -> DraftConfig:
        names = [f.name for f in fields(cls)]
        if not isinstance(tree, dict) or set(tree) != set(names):
            raise SlipstreamError(f"A draft's configuration has exactly the keys {sorted(names)}, got {tree!r}.")
        aux = tree["aux_layers"]
        numbers = [*(tree[name] for name in names[:-1]), *(aux if isinstance(aux, list) else [None])]
        if len(aux if isinstance(aux, list) else ()) != NUM_AUX or not all(
            isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers
        ):
            raise SlipstreamError(
                f"A draft's configuration holds whole numbers and {NUM_AUX} aux_layers, got {tree!r}."
            )
        config = cls(**{**tree, "aux_layers": tuple(aux)})
        if min(numbers[: len(names) - 1]) < 1 or config.num_heads % config.num_kv_heads or config.head_dim % 2:
            raise SlipstreamError(f"A draft of this shape cannot be built: {tree!r}.")
        return config

    @property
    def num_layers(self) -> int:
        return 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"aux_layers": list(self.aux_layers)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every weight."""
        h, q, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "fuse": (h, NUM_AUX * h),
            "embedding_norm": (h,),
            "hidden_norm": (h,),
            "qkv": (q + 2 * kv, 2 * h),
            "out": (h, q),
            "mlp_norm": (h,),
            "gate_up": (2 * self.intermediate_size, h),
            "down": (h, self.intermediate_size),
            "norm": (h,),
        }


class DraftNetwork:
    """A draft bound to its target, in the target's dtype and on its device.

    ``weights``: name → tensor as in ``DraftConfig.shapes``; ``vocabulary`` [vocab_size]: target ids, ascending.
    """

    def __init__(self, config: DraftConfig, weights: Mapping[str, Tensor], vocabulary: Tensor, target: Llama) -> None:
        check_fit(config, target.config)
        self.config, self.target = config, target
        self.weights = {name: weights[name].to(target.device, target.dtype) for name in config.shapes}
        self.vocabulary = vocabulary.to(target.device, torch.int64)
        self.head = target.head[self.vocabulary]  # [vocab_size, hidden]
        matrices = {name: tensor for name, tensor in self.weights.items() if tensor.ndim == 2}
        self.matrices = {name: pack(tensor, target.layout.kernels) for name, tensor in matrices.items()}
        self.packed_head = pack(self.head, target.layout.kernels)
        self.eps = target.config.rms_norm_eps

    @torch.inference_mode()
    def copy_weights(self, weights: Mapping[str, Tensor], vocabulary: Tensor) -> None:
        """Become another draft of this shape, in the same storage: what was captured with it drafts by the new one.

        SlipstreamError, and nothing changed, where names or shapes differ.
        """
        own = {**self.weights, **self.matrices, "vocabulary": self.vocabulary}
        copy_in_place(own, {**weights, "vocabulary": vocabulary}, "A draft")
        self.head.copy_(self.target.head[self.vocabulary])

    def cache(self, num_slots: int, max_len: int) -> KVCache:
        """Room for the draft's own keys and values."""
        target = self.target
        return KVCache(self.config, num_slots, max_len, target.dtype, target.device)

    def fuse(self, aux: Tensor) -> Tensor:
        """[N, 3 * hidden] of the target → [N, hidden]. Each layer is normalised: their scales differ by far."""
        h = self.config.hidden_size
        return linear(F.rms_norm(aux.view(-1, NUM_AUX, h), (h,), None, self.eps).reshape(-1, NUM_AUX * h),
                      self.matrices["fuse"])  # fmt: skip

    def project(self, token_ids: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [N, heads, hd], key and value [N, kv_heads, hd] of slots; query and key rotated to ``positions``."""
        w, c, h = self.weights, self.config, (self.config.hidden_size,)
        embedded = F.rms_norm(F.embedding(token_ids, self.target.embedding), h, w["embedding_norm"], self.eps)
        both = torch.cat([embedded, F.rms_norm(hidden, h, w["hidden_norm"], self.eps)], -1)
        qkv = linear(both, self.matrices["qkv"]).view(-1, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        cos, sin = self.target.cos[positions].unsqueeze(1), self.target.sin[positions].unsqueeze(1)
        qk = rotate(qkv[:, : c.num_heads + c.num_kv_heads], cos, sin)
        return qk[:, : c.num_heads], qk[:, c.num_heads :], qkv[:, c.num_heads + c.num_kv_heads :]

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The slot's output [N, hidden] from its hidden state and what attention gave, [N, heads * hd]."""
        w, norm = self.matrices, self.weights["mlp_norm"]
        x = hidden + linear(attended, w["out"])
        gate, up = linear(F.rms_norm(x, (self.config.hidden_size,), norm, self.eps), w["gate_up"]).chunk(2, -1)
        return x + linear(F.silu(gate) * up, w["down"])

    def normed(self, output: Tensor) -> Tensor:
        """What the head is applied to, [N, hidden]."""
        return F.rms_norm(output, (self.config.hidden_size,), self.weights["norm"], self.eps)

    @torch.inference_mode()
    def store(self, batch: Batch, hidden: Tensor, cache: KVCache) -> None:
        """Keys and values of slots whose predictions nobody wants: a prompt's."""
        _, key, value = self.project(batch.token_ids, hidden, batch.positions)
        cache.write(0, batch.places, key, value)

    @torch.inference_mode()
    def forward(self, batch: Batch, hidden: Tensor, cache: KVCache) -> Tensor:
        """Outputs [N, hidden] of the slots of ``batch``; ``hidden`` [N, hidden] fused, or outputs of slots before."""
        query, key, value = self.project(batch.token_ids, hidden, batch.positions)
        cache.write(0, batch.places, key, value)
        return self.finish(hidden, attend(0, query, batch, cache))

    @torch.inference_mode()
    def logits(self, output: Tensor) -> Tensor:
        """[N, vocab_size] over the draft's vocabulary."""
        return linear(self.normed(output), self.packed_head)

    @torch.inference_mode()
    def likeliest(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The first of the likeliest tokens as a target's id and its probability, both [N], from outputs [N, hidden].

        Sums over a vocabulary want more than bfloat16: its probabilities are off by some hundredths (docs/log.md).
        """
        logits = self.logits(output)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        best, at = logits.max(-1)
        return self.vocabulary[at], (best - logits.logsumexp(-1)).exp()


def check_fit(config: DraftConfig, target: LlamaConfig) -> None:
    """A draft that cannot stand on this target is refused with the reason."""
    if config.hidden_size != target.hidden_size:
        raise SlipstreamError(f"The draft has hidden size {config.hidden_size}, its target {target.hidden_size}.")
    if config.head_dim != target.head_dim:
        raise SlipstreamError(f"The draft has head_dim {config.head_dim}, its target {target.head_dim}.")
    if max(config.aux_layers) >= target.num_layers:
        raise SlipstreamError(f"The draft reads layers {config.aux_layers}, its target has {target.num_layers}.")
    if config.vocab_size > target.vocab_size:
        raise SlipstreamError(f"The draft has {config.vocab_size} tokens, its target {target.vocab_size}.")
