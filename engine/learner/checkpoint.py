"""A training that goes on where it stopped: weights and optimiser in one safetensors file, the rest in its header.

The file is written beside the old one and renamed over it: whatever kills the process, one of the two is there whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.contracts import SlipstreamError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save(path: Path, state: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
    """``state`` from ``Trainer.state``, ``progress`` anything JSON knows."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {f"weights/{name}": w.contiguous() for name, w in state["weights"].items()}
    for number, moments in state["optimizer"]["state"].items():
        tensors |= {f"{moment}/{number}": moments[moment].contiguous() for moment in _MOMENTS}
    header = {"steps": state["steps"], "usual": state["usual"], "progress": dict(progress)}
    fresh = path.with_suffix(".new")
    save_file(tensors, fresh, metadata={"state": json.dumps(header)})
    with fresh.open("rb+") as file:
        os.fsync(file.fileno())
    fresh.replace(path)


def load(path: Path, groups: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state for ``Trainer.load_state``, progress); ``groups`` are the optimiser's own parameter groups."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise SlipstreamError(f"{path} is not a checkpoint of a training: {error}. Remove it to start again.") from None
    weights, moments = dict[str, Tensor](), dict[int, dict[str, torch.Tensor]]()
    for name, tensor in tensors.items():
        kind, _, key = name.partition("/")
        if kind == "weights":
            weights[key] = tensor
        else:
            moments.setdefault(int(key), {})[kind] = tensor
    optimizer = {"state": moments, "param_groups": groups}
    return {"weights": weights, "optimizer": optimizer, "steps": header["steps"], "usual": header["usual"]}, header[
        "progress"
    ]
