"""A neural draft as files: ``draft.json`` says its shape, ``draft.safetensors`` holds weights and vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.contracts import SlipstreamError
from engine.model.draft import DraftConfig
from engine.speculation.proposer import PolicyError

SHAPE_FILE = "draft.json"
WEIGHTS_FILE = "draft.safetensors"
VOCABULARY = "vocabulary"
STORED = torch.float16
"""Weights of a draft are of order one and need precision more than range; overflow is refused when packing."""


@dataclass(frozen=True, slots=True)
class DraftFile:
    """``weights`` as stored; ``vocabulary`` [vocab_size] int32: target ids, strictly ascending."""

    config: DraftConfig
    weights: dict[str, Tensor]
    vocabulary: Tensor


def pack(config: DraftConfig, weights: Mapping[str, Tensor], vocabulary: Tensor) -> dict[str, bytes]:
    """The two files. The same tensors give the same bytes; what ``unpack`` would refuse is refused here."""
    from safetensors.torch import save

    tensors = {name: weights[name].detach().to("cpu", STORED).contiguous() for name in config.shapes}
    tensors[VOCABULARY] = vocabulary.detach().to("cpu", torch.int32).contiguous()
    _check(config, tensors)
    shape = json.dumps(config.to_json(), indent=1, sort_keys=True)
    return {SHAPE_FILE: shape.encode(), WEIGHTS_FILE: save(tensors)}


def draft_files(policy: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of the draft in a neural or hybrid policy; nothing in one without a draft."""
    return {name: policy[name] for name in (SHAPE_FILE, WEIGHTS_FILE) if name in policy}


def unpack(files: Mapping[str, bytes]) -> DraftFile:
    """The draft of a policy, whose other files are left alone.

    Strict: a tensor that is missing, unknown, misshapen or not finite is a PolicyError with its name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        config = DraftConfig.from_json(json.loads(files[SHAPE_FILE]))
    except (ValueError, SlipstreamError) as error:
        raise PolicyError(f"{SHAPE_FILE} does not describe a draft: {error}") from None
    try:
        tensors = load(files[WEIGHTS_FILE])
    except (SafetensorError, KeyError, ValueError) as error:
        raise PolicyError(f"{WEIGHTS_FILE} is not a safetensors file: {error}") from None
    _check(config, tensors)
    vocabulary = tensors.pop(VOCABULARY)
    return DraftFile(config, tensors, vocabulary)


def _check(config: DraftConfig, tensors: Mapping[str, Tensor]) -> None:
    wanted = {**config.shapes, VOCABULARY: (config.vocab_size,)}
    problems = [f"missing {name}" for name in sorted(set(wanted) - set(tensors))]
    problems += [f"unknown {name}" for name in sorted(set(tensors) - set(wanted))]
    for name in sorted(set(wanted) & set(tensors)):
        tensor, dtype = tensors[name], torch.int32 if name == VOCABULARY else STORED
        if tuple(tensor.shape) != wanted[name] or tensor.dtype != dtype:
            problems.append(f"{name} is {tensor.dtype}{list(tensor.shape)}, not {dtype}{list(wanted[name])}")
        elif name != VOCABULARY and not bool(tensor.isfinite().all()):
            problems.append(f"{name} holds values that are not finite")
        elif name == VOCABULARY and (int(tensor[0]) < 0 or not bool((tensor[1:] > tensor[:-1]).all())):
            problems.append(f"{name} must be token ids in strictly ascending order")
    if problems:
        raise PolicyError(f"{WEIGHTS_FILE} does not fit {SHAPE_FILE}: {'; '.join(problems)}.")
