"""The shape of a Llama-family model, read from its config.json. What is not supported is refused by name.

Llama (SmolLM2 is one), Qwen2 (query, key and value have biases) and Qwen3 (queries and keys are normed by head).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.contracts import SlipstreamError

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama", "qwen2", "qwen3"),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "use_sliding_window": (False, None),
}
"""Keys whose other values would need code that is not here; a missing key counts as its default."""

_DEFAULTS = {"hidden_act": "silu", "model_type": None}


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise SlipstreamError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise SlipstreamError(f"head_dim must be even for rotary embedding, got {self.head_dim}.")

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_folder(cls, folder: Path) -> LlamaConfig:
        path = folder / "config.json"
        try:
            return cls.from_json(json.loads(path.read_text()))
        except FileNotFoundError:
            raise SlipstreamError(f"{folder} has no config.json: not a model folder in Hugging Face layout.") from None
        except ValueError as error:
            raise SlipstreamError(f"{path} is not JSON: {error}") from None

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> LlamaConfig:
        for key, allowed in _MUST_BE.items():
            value = tree.get(key, _DEFAULTS.get(key))
            if value not in allowed:
                only = ", ".join(repr(one) for one in allowed if one is not None) or "leaving it out"
                raise SlipstreamError(f"config.json: {key} = {value!r} is not supported, only {only}.")
        if sliding := sorted(set(tree.get("layer_types") or ()) - {"full_attention"}):
            raise SlipstreamError(f"config.json: layer_types {sliding} are not supported, only 'full_attention'.")
        kind = tree.get("model_type")
        heads = _integer(tree, "num_attention_heads")
        hidden = _integer(tree, "hidden_size")
        return cls(
            vocab_size=_integer(tree, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_integer(tree, "intermediate_size"),
            num_layers=_integer(tree, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=_integer(tree, "num_key_value_heads", heads),
            head_dim=_integer(tree, "head_dim", 128 if kind == "qwen3" else hidden // heads),
            max_position=_integer(tree, "max_position_embeddings", 2048),
            rope_theta=_rope_theta(tree),
            rms_norm_eps=float(tree.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(tree.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
        )

    def to_json(self) -> dict[str, Any]:
        """The config.json of this shape, as transformers reads it."""
        kind = "qwen3" if self.qk_norm else "qwen2" if self.qkv_bias else "llama"
        return {
            "architectures": [f"{kind.capitalize()}ForCausalLM"],
            "model_type": kind,
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
        }


def _integer(tree: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = tree.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SlipstreamError(f"config.json: {key} must be a positive integer, got {value!r}.")
    return value


def _rope_theta(tree: Mapping[str, Any]) -> float:
    """theta from ``rope_theta`` or, as transformers 5 writes it, ``rope_parameters``. Scaled variants are refused."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = tree.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", None):
            raise SlipstreamError(f"config.json: {key} of type {kind!r} is not supported, only 'default'.")
        if (share := rope.get("partial_rotary_factor", 1.0)) not in (1.0, None):
            raise SlipstreamError(f"config.json: {key}.partial_rotary_factor = {share!r} is not supported.")
    parameters = tree.get("rope_parameters") or {}
    return float(parameters.get("rope_theta", tree.get("rope_theta") or 10_000.0))
