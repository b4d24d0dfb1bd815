"""A neural draft on disk: what is read is what was written, and nothing else is read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from engine.contracts import ProposerKind, artifact_digest
from engine.learner.trainer import fresh_weights
from engine.model.draft import DraftConfig
from engine.model.random_weights import TINY, random_llama
from engine.speculation import neural
from engine.speculation.artifact import build_artifact, load_proposer
from engine.speculation.draft_pools import DraftPools
from engine.speculation.neural_file import SHAPE_FILE, VOCABULARY, WEIGHTS_FILE, pack, unpack
from engine.speculation.proposer import PolicyError

CONFIG = DraftConfig.of_target(TINY, 16)


def files() -> dict[str, bytes]:
    return pack(CONFIG, fresh_weights(CONFIG, random_llama(), 0), torch.arange(0, 32, 2))


def test_what_is_read_is_what_was_written() -> None:
    weights = fresh_weights(CONFIG, random_llama(), 0)
    draft = unpack(files())
    assert draft.config == CONFIG
    assert draft.vocabulary.tolist() == list(range(0, 32, 2))
    for name, tensor in draft.weights.items():
        torch.testing.assert_close(tensor, weights[name].half())
    assert files() == files()


def with_tensor(name: str, tensor: torch.Tensor | None) -> dict[str, bytes]:
    made = files()
    tensors = load(made[WEIGHTS_FILE])
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    return {**made, WEIGHTS_FILE: save(tensors)}


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("out", None, "missing out"),
        ("head", torch.zeros(2), "unknown head"),
        ("norm", torch.zeros(31, dtype=torch.float16), "norm is"),
        ("norm", torch.zeros(32), "float32"),
        ("norm", torch.full((32,), float("nan"), dtype=torch.float16), "not finite"),
        (VOCABULARY, torch.arange(15, -1, -1, dtype=torch.int32), "ascending"),
        (VOCABULARY, torch.arange(-1, 15, dtype=torch.int32), "ascending"),
    ],
)
def test_anything_else_is_refused_by_name(name: str, tensor: torch.Tensor | None, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        unpack(with_tensor(name, tensor))


def test_overflow_is_refused_when_writing() -> None:
    weights = fresh_weights(CONFIG, random_llama(), 0)
    weights["down"][0, 0] = 1e6
    with pytest.raises(PolicyError, match="not finite"):
        pack(CONFIG, weights, torch.arange(16))


@pytest.mark.parametrize("change", [{"head_dim": 0}, {"aux_layers": [0, 1]}, {"more": 1}, {"num_heads": True}])
def test_impossible_shapes_are_refused(change: dict[str, object]) -> None:
    shape = json.dumps(CONFIG.to_json() | change).encode()
    with pytest.raises(PolicyError, match=SHAPE_FILE):
        unpack({**files(), SHAPE_FILE: shape})


def test_a_draft_stands_on_its_own_target_only() -> None:
    with pytest.raises(PolicyError, match="target_fingerprint"):
        build_artifact(ProposerKind.NEURAL, 4, files=files())
    made = build_artifact(ProposerKind.NEURAL, 4, files=files(), target_fingerprint="t" * 64)
    policy = load_proposer(made, artifact_digest(made), "t" * 64)
    assert isinstance(policy, neural.NeuralProposer)
    with pytest.raises(PolicyError, match="bind it"):
        policy.start([1, 2], "chat")
    with pytest.raises(PolicyError, match="cannot stand"):
        policy.bind(DraftPools(random_llama(replace(TINY, num_layers=1)), 1, 64))
    with pytest.raises(PolicyError, match="min_survival"):
        build_artifact(ProposerKind.NEURAL, 4, files=files(), target_fingerprint="t", settings={"min_survival": 1.0})
