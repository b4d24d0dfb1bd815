"""The target's hidden states of known tokens, by one prefill."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.contracts import SlipstreamError
from engine.model.batch import Row
from engine.model.kv_cache import KVCache
from engine.model.llama import Llama

CHUNK = 512


def hidden_states(model: Llama, token_ids: Sequence[int], aux_layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(last hidden states [n, hidden] before the norm, outputs of ``aux_layers`` [n, len * hidden])."""
    return _prefill(model, token_ids, aux_layers, len(model.layers))


def aux_states(model: Llama, token_ids: Sequence[int], aux_layers: Sequence[int]) -> Tensor:
    """Outputs of ``aux_layers`` [n, len * hidden]; layers above the last of them are not computed."""
    return _prefill(model, token_ids, aux_layers, 1 + max(aux_layers))[1]


@torch.inference_mode()
def _prefill(model: Llama, token_ids: Sequence[int], aux_layers: Sequence[int], depth: int) -> tuple[Tensor, Tensor]:
    n = len(token_ids)
    if n > model.config.max_position:
        raise SlipstreamError(f"A sequence of {n} tokens is longer than the target's {model.config.max_position}.")
    cache = KVCache(model.config, 1, n, model.dtype, model.device)
    last, aux = [], []
    for start in range(0, n, CHUNK):
        row = Row(0, start, token_ids[start : start + CHUNK])
        batch = model.lay_out([], [row], n)
        x, states = model.forward_with_aux(batch, cache, aux_layers, depth)
        assert states is not None
        last.append(x)
        aux.append(states)
    return torch.cat(last), torch.cat(aux)
