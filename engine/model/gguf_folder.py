"""A Llama GGUF rewritten as a folder in Hugging Face layout, float32, by the gguf package alone.

Covers what the packaged default model is made of: architecture llama, a GPT-2 style BPE with SmolLM's pre-tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.contracts import SlipstreamError
from engine.model.config import LlamaConfig

_CONTROL = 3  # gguf token type of special tokens
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise ``gguf`` into ``folder``: config, weights, tokenizer, chat template."""
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(fields, tied="output.weight" not in tensors)
    folder.mkdir(parents=True)
    save_file(
        {_hf_name(name): _dequantise(name, tensor, config) for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    eos = fields["tokenizer.ggml.eos_token_id"]
    _write_json(folder / "config.json", config.to_json() | {"eos_token_id": eos, "dtype": "float32"})
    _write_json(folder / "tokenizer.json", _tokenizer(fields))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))


def _config(fields: dict[str, Any], tied: bool) -> LlamaConfig:
    for key, wanted in {"general.architecture": "llama", "tokenizer.ggml.pre": "smollm"}.items():
        if fields.get(key) != wanted:
            raise SlipstreamError(f"This GGUF has {key} = {fields.get(key)!r}; only {wanted!r} can be converted.")
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=fields["llama.feed_forward_length"],
        num_layers=fields["llama.block_count"],
        num_heads=heads,
        num_kv_heads=fields["llama.attention.head_count_kv"],
        head_dim=hidden // heads,
        max_position=fields["llama.context_length"],
        rope_theta=fields["llama.rope.freq_base"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        tie_embeddings=tied,
    )


def _hf_name(name: str) -> str:
    """blk.3.attn_q.weight → model.layers.3.self_attn.q_proj.weight"""
    parts = name.split(".")
    if parts[0] == "blk" and parts[2] in _INNER:
        return f"model.layers.{parts[1]}.{_INNER[parts[2]]}.{parts[3]}"
    if parts[0] in _OUTER:
        return f"{_OUTER[parts[0]]}.{parts[1]}"
    raise SlipstreamError(f"This GGUF has a tensor {name!r} that a Llama model does not have.")


def _dequantise(name: str, tensor: Any, config: LlamaConfig) -> np.ndarray:
    from gguf.quants import dequantize

    weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    for part, heads in (("attn_q", config.num_heads), ("attn_k", config.num_kv_heads)):
        if part in name:
            # llama.cpp interleaves the two halves of every head for its rotary kernel; put them back one after another.
            pairs = weight.reshape(heads, config.head_dim // 2, 2, config.hidden_size)
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
    return np.ascontiguousarray(weight)


def _tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json of SmolLM: digits one by one, then GPT-2's byte-level BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tree: dict[str, Any] = json.loads(tokenizer.to_str())
    return tree


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "chat_template": fields["tokenizer.chat_template"],
    }


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
