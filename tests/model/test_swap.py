"""New weights in the storage of old ones: what was captured goes on, and says what the new weights say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.contracts import SlipstreamError
from engine.model.batch import Row, build_batch
from engine.model.config import LlamaConfig
from engine.model.draft import DraftConfig, DraftNetwork
from engine.model.kv_cache import KVCache
from engine.model.linear import Packed, copy_in_place
from engine.model.llama import Llama
from engine.model.padded import Bucket, PaddedRows
from engine.model.random_weights import TINY, random_llama, random_tensors
from tests.model.tape import Tape

ROW = Row(0, 0, [3, 1, 4])
QWEN = replace(TINY, qkv_bias=True, qk_norm=True, tie_embeddings=True)


def logits(model: Llama) -> torch.Tensor:
    cache = KVCache(model.config, 1, 64, model.dtype)
    batch = build_batch([ROW], [], 64, model.config.group_size, model.dtype, model.device)
    return model.logits(model.forward(batch, cache))


def storage(model: Llama) -> list[int]:
    tensors = [model.embedding, model.norm, model.head]
    tensors += [w for layer in model.layers for w in layer.weights().values() if isinstance(w, torch.Tensor)]
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("config", [TINY, QWEN], ids=["llama", "qwen"])
def test_a_target_takes_new_weights_in_place(config: LlamaConfig) -> None:
    model, other = random_llama(config, seed=1), random_llama(config, seed=2)
    was, places = logits(model), storage(model)
    model.copy_weights(random_tensors(config, 2))
    assert storage(model) == places
    assert torch.equal(logits(model), logits(other))
    assert not torch.allclose(logits(model), was)


def test_a_captured_pass_says_what_the_new_weights_say_and_is_not_captured_again() -> None:
    model, tape, bucket = random_llama(seed=1), Tape(), Bucket(1, 3, 64)
    cache = KVCache(TINY, 1, 64, model.dtype)
    padded, out = PaddedRows(cache, TINY.group_size, model.dtype, model.device), torch.zeros(3, 64, dtype=model.dtype)
    replay = tape(lambda: out.copy_(model.logits(model.forward(padded.batch(bucket), cache))))
    padded.fill(bucket, [ROW])
    model.copy_weights(random_tensors(TINY, 2))
    replay()
    torch.testing.assert_close(out, logits(random_llama(seed=2)))
    assert (tape.captures, tape.replays) == (1, 1)
    model.layers[0].down = torch.zeros_like(model.layers[0].down)  # planted: put in place, not copied into it
    replay()
    torch.testing.assert_close(out, logits(random_llama(seed=2)))


def test_weights_of_another_shape_are_refused_and_change_nothing() -> None:
    model = random_llama(seed=1)
    was = logits(model)
    tensors = random_tensors(TINY, 2)
    for wrong, message in (
        ({**tensors, "model.norm.weight": torch.ones(31)}, r"model.norm.weight has shape \[31\], not \[32\]"),
        ({n: t for n, t in tensors.items() if "layers.1.mlp.down" not in n}, "missing model.layers.1.mlp.down_proj"),
        (random_tensors(replace(TINY, intermediate_size=50), 2), "gate_proj.weight has shape"),
    ):
        with pytest.raises(SlipstreamError, match=message):
            model.copy_weights(wrong)
    assert torch.equal(logits(model), was)


def test_packed_weights_are_refused() -> None:
    packed = Packed(torch.zeros(2, 2))
    with pytest.raises(
        SlipstreamError, match="A draft cannot take these weights in place: qkv is in a layout of its own"
    ):
        copy_in_place({"qkv": packed}, {"qkv": torch.zeros(2, 2)}, "A draft")


def draft(target: Llama, seed: int, vocab_size: int = 16) -> tuple[DraftConfig, dict[str, torch.Tensor], torch.Tensor]:
    config = DraftConfig.of_target(target.config, vocab_size)
    generator = torch.Generator().manual_seed(seed)
    weights = {n: torch.randn(s, generator=generator).half() for n, s in config.shapes.items()}
    vocabulary = torch.randperm(target.config.vocab_size, generator=generator)[:vocab_size].sort().values.int()
    return config, weights, vocabulary


def draft_says(network: DraftNetwork) -> torch.Tensor:
    batch = build_batch([ROW], [], 64, TINY.group_size, network.target.dtype, network.target.device)
    hidden = torch.linspace(-1, 1, 3 * 32, dtype=network.target.dtype).view(3, 32)
    return network.logits(network.forward(batch, hidden, network.cache(1, 64)))


def test_a_draft_takes_new_weights_in_place_and_refuses_another_shape() -> None:
    target = random_llama(seed=1)
    network, other = DraftNetwork(*draft(target, 1), target), DraftNetwork(*draft(target, 2), target)
    was = draft_says(network)
    places = [t.data_ptr() for t in (*network.weights.values(), network.head, network.vocabulary)]
    _, weights, vocabulary = draft(target, 2)
    network.copy_weights(weights, vocabulary)
    assert [t.data_ptr() for t in (*network.weights.values(), network.head, network.vocabulary)] == places
    assert torch.equal(draft_says(network), draft_says(other))
    assert not torch.allclose(draft_says(network), was)
    _, weights, vocabulary = draft(target, 3, vocab_size=20)
    with pytest.raises(SlipstreamError, match=r"A draft cannot take .* vocabulary has shape \[20\], not \[16\]"):
        network.copy_weights(weights, vocabulary)
    assert torch.equal(draft_says(network), draft_says(other))
