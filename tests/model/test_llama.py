from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.contracts import SlipstreamError
from engine.model.batch import Row, _shared_width, build_batch
from engine.model.config import LlamaConfig
from engine.model.kv_cache import KVCache
from engine.model.linear import Packed, dense, linear, multiplies_bfloat16, pack
from engine.model.llama import Llama
from engine.model.random_weights import TINY, random_llama, random_tensors
from tests.model.plain_llama import plain_logits

CPU = torch.device("cpu")
MAX_LEN = 64


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, TINY.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(model: Llama, cache: KVCache, decodes: list[Row], prefills: list[Row]) -> torch.Tensor:
    batch = build_batch(decodes, prefills, cache.max_len, model.config.group_size, model.dtype, CPU)
    return model.logits(model.forward(batch, cache))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_one_prefill_is_the_plain_model(tied: bool, kv_heads: int) -> None:
    config = replace(TINY, tie_embeddings=tied, num_kv_heads=kv_heads)
    model, tokens = random_llama(config, seed=1), ids(20)
    got = run(model, KVCache(config, 2, MAX_LEN, model.dtype), [], [Row(1, 0, tokens)])
    torch.testing.assert_close(got, plain_logits(config, random_tensors(config, 1), tokens))


def test_chunks_decodes_and_drafts_together_are_the_plain_model() -> None:
    """Slots with holes, rows of unequal width and length, chunked prompts beside them: one pass each."""
    model, tensors = random_llama(), random_tensors(TINY, 0)
    cache = KVCache(TINY, 6, MAX_LEN, model.dtype)
    texts = {slot: ids(30, seed=slot) for slot in (0, 2, 5)}
    want = {slot: plain_logits(TINY, tensors, tokens) for slot, tokens in texts.items()}
    run(model, cache, [], [Row(0, 0, texts[0][:7]), Row(5, 0, texts[5][:3])])

    mixed = run(
        model,
        cache,
        [Row(0, 7, texts[0][7:8]), Row(5, 3, texts[5][3:8])],
        [Row(2, 0, texts[2][:10])],
    )
    torch.testing.assert_close(mixed, torch.cat([want[0][7:8], want[5][3:8], want[2][:10]]))

    after = run(model, cache, [Row(2, 20, texts[2][20:21])], [Row(2, 10, texts[2][10:20])])
    torch.testing.assert_close(after[1:], want[2][10:20])
    torch.testing.assert_close(
        run(model, cache, [Row(s, 8, texts[s][8:11]) for s in (0, 5)], []), torch.cat([want[0][8:11], want[5][8:11]])
    )


def test_rejected_drafts_leave_no_trace() -> None:
    model, tokens = random_llama(), ids(20)
    cache = KVCache(TINY, 1, MAX_LEN, model.dtype)
    run(model, cache, [], [Row(0, 0, tokens[:8])])
    run(model, cache, [Row(0, 8, [tokens[8], 1, 2, 3, 4])], [])  # its drafts are all wrong
    got = run(model, cache, [Row(0, 9, tokens[9:12])], [])
    torch.testing.assert_close(got, plain_logits(TINY, random_tensors(TINY, 0), tokens)[9:12])


def test_garbage_in_unused_slots_cannot_reach_a_row() -> None:
    model, tokens = random_llama(), ids(12)
    cache = KVCache(TINY, 3, MAX_LEN, model.dtype)
    for slot in (0, 1):  # sequences that have left, longer than the one that stays
        run(model, cache, [], [Row(slot, 0, ids(40, seed=9))])
    run(model, cache, [], [Row(2, 0, tokens[:11])])
    got = run(model, cache, [Row(2, 11, tokens[11:])], [])
    torch.testing.assert_close(got, plain_logits(TINY, random_tensors(TINY, 0), tokens)[11:])


QWEN2 = replace(TINY, qkv_bias=True, rms_norm_eps=1e-6)
QWEN3 = replace(TINY, qk_norm=True, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e6)
FAMILY = pytest.mark.parametrize("config", [TINY, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])


@FAMILY
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-4)])
def test_parity_with_transformers(config: LlamaConfig, dtype: torch.dtype, tolerance: float) -> None:
    """In float64 too only to 1e-5: transformers computes norms and rotations in float32 whatever the dtype."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**config.to_json())
    reference = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="eager").to(dtype)
    tensors = random_tensors(config, 0, dtype)
    reference.load_state_dict(tensors)
    tokens = ids(40)
    with torch.no_grad():
        want = reference(torch.tensor([tokens])).logits[0]
    model = Llama.from_checkpoint(config, tensors, dtype, CPU)
    cache = KVCache(config, 1, MAX_LEN, dtype)
    run(model, cache, [], [Row(0, 0, tokens[:30])])
    got = run(model, cache, [Row(0, 30, tokens[30:])], [])
    torch.testing.assert_close(got, want[30:], atol=tolerance, rtol=tolerance)
    for layer in model.layers:  # planted: without what makes the family, the logits are others
        layer.qkv_bias = layer.qk_norm = None
    plain = run(model, KVCache(config, 1, MAX_LEN, dtype), [], [Row(0, 0, tokens)])
    assert torch.allclose(plain[30:], want[30:], atol=0.01) == (config is TINY)


@FAMILY
def test_the_config_that_transformers_writes_is_read(config: LlamaConfig) -> None:
    transformers = pytest.importorskip("transformers")
    assert LlamaConfig.from_json(transformers.AutoConfig.for_model(**config.to_json()).to_dict()) == config


def test_a_long_draft_attends_alone_and_is_the_plain_model() -> None:
    model, tensors = random_llama(), random_tensors(TINY, 0)
    cache = KVCache(TINY, 8, MAX_LEN, model.dtype)
    slots = range(8)
    texts = {slot: ids(40, seed=slot) for slot in slots}
    want = {slot: plain_logits(TINY, tensors, tokens) for slot, tokens in texts.items()}
    run(model, cache, [], [Row(slot, 0, texts[slot][:20]) for slot in slots[:7]])
    ends = {slot: 30 if slot in (2, 5) else 21 for slot in slots[:7]}
    decodes = [Row(slot, 20, texts[slot][20:end]) for slot, end in ends.items()]
    prompt = Row(7, 0, texts[7][:9])
    batch = build_batch(decodes, [prompt], MAX_LEN, TINY.group_size, model.dtype, CPU)
    assert [(group.slot, group.last - group.first) for group in batch.lone] == [(2, 10), (5, 10)]
    got = model.logits(model.forward(batch, cache))
    torch.testing.assert_close(got, torch.cat([*(want[slot][20:end] for slot, end in ends.items()), want[7][:9]]))


@pytest.mark.parametrize(
    ("rows", "least", "width"),
    [
        ([(0, 9)], 1, 9),  # one request: together is alone
        ([(15, 9)], 2, 2),  # the fifteen slots below it would be padded too
        ([(i, 9) for i in range(4)], 2, 9),
        ([(0, 9), *((i, 1) for i in range(1, 16))], 2, 2),
        ([(i, 2) for i in range(16)], 2, 2),
        ([(i, 1 + i % 3) for i in range(16)], 1, 3),
    ],
)
def test_rows_attend_together_where_that_costs_less(rows: list[tuple[int, int]], least: int, width: int) -> None:
    assert _shared_width(rows, least) == width


needs_bfloat16 = pytest.mark.skipif(not multiplies_bfloat16(), reason="no hardware for bfloat16 here")


@needs_bfloat16
def test_packed_products_do_not_depend_on_the_number_of_rows() -> None:
    weight, x = torch.randn(960, 576).bfloat16(), torch.randn(64, 576).bfloat16()
    packed = pack(weight, kernels=False)
    assert isinstance(packed, Packed)
    assert torch.equal(dense(packed), weight)
    whole = linear(x, packed)
    torch.testing.assert_close(whole, torch.nn.functional.linear(x, weight), atol=0.25, rtol=0.02)
    for rows in (1, 2, 3, 5, 8, 16, 33):
        assert torch.equal(linear(x[:rows], packed), whole[:rows]), rows


@needs_bfloat16
def test_a_bfloat16_pass_does_not_depend_on_how_much_is_drafted() -> None:
    """Five tokens one after the other and in one pass beside a neighbour: the same hidden states to the last bit."""
    config = replace(TINY, hidden_size=64, intermediate_size=128, head_dim=16)
    model, tokens = random_llama(config, dtype=torch.bfloat16), ids(60)
    one, many = (KVCache(config, 3, 128, torch.bfloat16) for _ in range(2))
    for cache in (one, many):
        run(model, cache, [], [Row(0, 0, tokens[:40])])
    single = torch.cat([run(model, one, [Row(0, 40 + i, [tokens[40 + i]])], []) for i in range(5)])
    run(model, many, [], [Row(2, 0, tokens[:13])])
    together = run(model, many, [Row(0, 40, tokens[40:45]), Row(2, 13, tokens[13:15])], [])
    assert torch.equal(together[:5], single)


@pytest.mark.parametrize("rows", [1, 2, 7, 10, 13, 16, 64, 65])
def test_linear_is_linear_for_every_number_of_rows(rows: int) -> None:
    x, weight = torch.randn(rows, 12), torch.randn(20, 12)
    out = linear(x, weight)
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight))
    assert out.is_contiguous()


def test_bfloat16_runs() -> None:
    model = random_llama(dtype=torch.bfloat16)
    assert run(model, KVCache(TINY, 1, MAX_LEN, model.dtype), [], [Row(0, 0, ids(5))]).isfinite().all()


def test_loading_is_strict_and_names_the_tensors() -> None:
    def refused(message: str, drop: str = "", **add: torch.Tensor) -> None:
        tensors = random_tensors(TINY, 0) | add
        tensors.pop(drop, None)
        with pytest.raises(SlipstreamError, match=message):
            Llama.from_checkpoint(TINY, tensors, torch.float64, CPU)

    refused("missing model.layers.1.mlp.up_proj.weight", drop="model.layers.1.mlp.up_proj.weight")
    refused("unexpected model.layers.9.bias", **{"model.layers.9.bias": torch.zeros(1)})
    refused("model.norm.weight has shape", **{"model.norm.weight": torch.zeros(3)})
    refused("missing lm_head.weight", drop="lm_head.weight")


def test_derived_tensors_of_old_checkpoints_are_no_error() -> None:
    config = replace(TINY, tie_embeddings=True)
    tensors = random_tensors(config, 0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    Llama.from_checkpoint(config, tensors, torch.float64, CPU)


def test_config_round_trip_and_rope_of_transformers_5() -> None:
    assert LlamaConfig.from_json(TINY.to_json()) == TINY
    tree = TINY.to_json() | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    del tree["rope_theta"]
    assert LlamaConfig.from_json(tree).rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling of type 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters of type 'yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": None}, "vocab_size must be a positive integer"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 7}, "even"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(SlipstreamError, match=message):
        LlamaConfig.from_json(TINY.to_json() | change)
