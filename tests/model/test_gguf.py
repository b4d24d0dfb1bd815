"""The GGUF conversion, on a tiny GGUF made here the way llama.cpp makes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.contracts import SlipstreamError
from engine.model.gguf_folder import _INNER, convert_gguf
from engine.model.loading import load_target
from engine.model.random_weights import TINY, random_tensors

gguf = pytest.importorskip("gguf")
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghij0123456789", "ab", *(f"x{i}" for i in range(40))]
CONFIG = replace(TINY, tie_embeddings=True, vocab_size=len(TOKENS), rms_norm_eps=float(np.float32(1e-5)))


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, tensors: dict[str, torch.Tensor], pre: str = "smollm") -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(CONFIG.num_layers)
    writer.add_context_length(CONFIG.max_position)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_heads)
    writer.add_head_count_kv(CONFIG.num_kv_heads)
    writer.add_rope_freq_base(CONFIG.rope_theta)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {hf: name for name, hf in _INNER.items()} | {"embed_tokens": "token_embd", "norm": "output_norm"}
    for hf, tensor in tensors.items():
        parts = hf.removeprefix("model.").removesuffix(".weight").split(".")
        name = f"blk.{parts[1]}.{names['.'.join(parts[2:])]}" if parts[0] == "layers" else names[parts[0]]
        array = tensor.float().numpy()
        if name.endswith(("attn_q", "attn_k")):
            array = interleaved(array, CONFIG.num_heads if name.endswith("q") else CONFIG.num_kv_heads)
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_becomes_the_model_it_was_made_of(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG, 0, torch.float32)
    write(tmp_path / "m.gguf", tensors)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "model")
    target = load_target(str(tmp_path / "model"), tmp_path)
    assert target.config == CONFIG
    want = torch.cat([tensors[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"])
    assert torch.equal(target.model.layers[0].qkv, want)
    assert torch.equal(target.model.embedding, tensors["model.embed_tokens.weight"])
    assert target.tokenizer.eos_ids == {2}
    # Digits stand alone, merges apply, special tokens are single and silent.
    encoded = target.tokenizer.encode("<|im_start|>ab12")
    assert [TOKENS[i] for i in encoded] == ["<|im_start|>", "ab", "1", "2"]
    assert target.tokenizer.decode(encoded) == "ab12"
    assert target.tokenizer.apply_chat_template([{"role": "user", "content": "ab"}]) == [TOKENS.index("ab")]


def test_another_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", random_tensors(CONFIG, 0, torch.float32), pre="llama-bpe")
    with pytest.raises(SlipstreamError, match="'llama-bpe'"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "model")
