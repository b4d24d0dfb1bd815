"""What the draft says from every position of known sequences at once, chains going on with the known tokens: training.

A chain that starts at slot m drafts x[m+2] from the target's own hidden state, then x[m+3] from its own output at m,
and so on. Step s computes, for every slot i, the member of the chain that started at i - (s - 1): it attends to the
target-fed keys up to the chain's start and to the chain's own keys since (training-time test of EAGLE-3, arXiv
2503.01840). In serving the same numbers come from the KV cache; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.draft import DraftNetwork


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence among flat slots [first, last); chains start at ``begin`` and after. All are flat places."""

    first: int
    begin: int
    last: int


@dataclass(slots=True)
class _Step:
    query: Tensor  # [M, heads, hd]
    key: Tensor  # [M, kv_heads, hd]
    value: Tensor


def unroll(
    network: DraftNetwork,
    token_ids: Tensor,
    fused: Tensor,
    segments: Sequence[Segment],
    steps: int,
) -> list[Tensor]:
    """Outputs [M, hidden] of each step for the M slots [begin, last) of all segments, one segment after the other.

    ``token_ids`` [N]: x[i+1] of every slot, ``fused`` [N, hidden] from ``DraftNetwork.fuse``. The row of slot i in step
    s means something only where i - (s - 1) >= begin.
    """
    device = token_ids.device
    positions = torch.cat([torch.arange(s.last - s.first, device=device) for s in segments])
    late = torch.cat([torch.arange(s.begin, s.last, device=device) for s in segments])
    query, key, value = network.project(token_ids, fused, positions)
    chains = [_Step(query[late], key[late], value[late])]
    together = [_all(segments, device)] if launches_cost(device) else [_one(s, device) for s in segments]
    outputs, hidden = list[Tensor](), fused[late]
    for step in range(1, steps + 1):
        if step > 1:
            hidden = _shift(outputs[-1], 1)
            chains.append(_Step(*network.project(token_ids[late], hidden, positions[late])))
        parts, row = [], 0
        for one in together:
            rows = slice(row, row + len(one.places))
            own = [_Step(c.query[rows], c.key[rows], c.value[rows]) for c in chains]
            parts.append(_attend(own, key[one.slots], value[one.slots], one))
            row = rows.stop
        outputs.append(network.finish(hidden, torch.cat(parts)))
    return outputs


def launches_cost(device: torch.device) -> bool:
    """Whether few large products are cheaper there than many small ones."""
    return device.type == "cuda"


@dataclass(frozen=True, slots=True)
class _Together:
    """Chains that attend in one call, over the keys of ``slots``. All else counts from the first of these."""

    slots: slice
    places: Tensor  # [R]: the slot of each row
    firsts: Tensor  # [R]: the first slot of the row's own sequence


def _one(segment: Segment, device: torch.device) -> _Together:
    places = torch.arange(segment.begin - segment.first, segment.last - segment.first, device=device)
    return _Together(slice(segment.first, segment.last), places, torch.zeros_like(places))


def _all(segments: Sequence[Segment], device: torch.device) -> _Together:
    """Each masked from the others: most of the scores are thrown away."""
    places = torch.cat([torch.arange(s.begin, s.last) for s in segments])
    firsts = torch.cat([torch.full((s.last - s.begin,), s.first) for s in segments])
    return _Together(slice(0, segments[-1].last), places.to(device), firsts.to(device))


def _attend(chain: Sequence[_Step], key: Tensor, value: Tensor, one: _Together) -> Tensor:
    """Of the last step of ``chain``, which holds one row per slot: what a chain said earlier lies some rows above."""
    step, own = len(chain), chain[1:]
    slots = torch.arange(key.shape[0], device=key.device)
    seen = (slots <= (one.places - (step - 1))[:, None]) & (slots >= one.firsts[:, None])
    keys = [_shift(c.key, step - t) for t, c in enumerate(own, 2)]
    values = [_shift(c.value, step - t) for t, c in enumerate(own, 2)]
    return attend_chains(chain[-1].query, key, value, seen, keys, values)


def attend_chains(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> Tensor:
    """[R, heads * hd] for ``query`` [R, heads, hd] of R chains: over those of the target-fed ``key`` and ``value``
    [T, kv_heads, hd] that each has ``seen`` [R, T], and over its own since (``keys`` and ``values``,
    [R, kv_heads, hd] for each step)."""
    count, heads, dim = query.shape
    kv_heads = key.shape[1]
    query = query.view(count, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3) * dim**-0.5  # [kv, g, R, hd]
    scores = (query @ key.permute(1, 2, 0).unsqueeze(1)).masked_fill(~seen, float("-inf"))
    own = [(query * k.transpose(0, 1).unsqueeze(1)).sum(-1, keepdim=True) for k in keys]
    weights = torch.cat([scores, *own], -1).softmax(-1)
    out = weights[..., : key.shape[0]] @ value.transpose(0, 1).unsqueeze(1)
    for i, v in enumerate(values):
        out = out + weights[..., key.shape[0] + i, None] * v.transpose(0, 1).unsqueeze(1)
    return out.permute(2, 0, 1, 3).reshape(count, heads * dim)


def _shift(x: Tensor, by: int) -> Tensor:
    """Row i gets row i - ``by``; zeros come in."""
    return x if by == 0 else torch.cat([x.new_zeros(by, *x.shape[1:]), x[:-by]])[: x.shape[0]]
