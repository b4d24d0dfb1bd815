"""One target pass as tensors: flat tokens for the linear layers, groups of them for attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """The decode rows, which attend together: the first ``num_tokens`` of the flat tokens, padded to [rows, width].

    ``pad`` [num_tokens] is the place of each token in the padded [rows * width], None where that is the identity;
    ``mask`` [rows, 1, width * group_size, length], 0 or -inf, None where every key counts.
    """

    num_tokens: int
    rows: int
    width: int
    length: int
    pad: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillGroup:
    """One chunk of one prompt, which attends alone: flat tokens [first, last), ``length`` keys with its own.

    ``mask`` [last - first times group_size, length], 0 or -inf.
    """

    first: int
    last: int
    slot: int
    length: int
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """``token_ids``, ``positions``, ``places`` [N], int64; ``places`` are flat KV cache places. Decode tokens first."""

    token_ids: Tensor
    positions: Tensor
    places: Tensor
    decode: DecodeGroup | None
    prefills: tuple[PrefillGroup, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Consecutive tokens of one sequence: ``token_ids`` at positions ``start``… of ``slot``."""

    slot: int
    start: int
    token_ids: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


LENGTH_STEP = 64


def build_batch(
    decodes: Sequence[Row],
    prefills: Sequence[Row],
    max_len: int,
    group_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Batch:
    """Lay out the rows of one pass; ``max_len`` is the cache's, ``group_size`` the query heads per kv head."""
    rows = [*decodes, *prefills]
    ids = [token for row in rows for token in row.token_ids]
    positions = [position for row in rows for position in range(row.start, row.end)]
    places = [row.slot * max_len + position for row in rows for position in range(row.start, row.end)]
    flat = torch.tensor([ids, positions, places], dtype=torch.int64, device=device)
    chunks, first = [], sum(len(row.token_ids) for row in decodes)
    for row in prefills:
        last = first + len(row.token_ids)
        mask = _causal(flat[1, first:last], row.end, group_size, dtype)
        chunks.append(PrefillGroup(first, last, row.slot, row.end, mask))
        first = last
    decode = _decode_group(decodes, max_len, group_size, dtype, device) if decodes else None
    return Batch(flat[0], flat[1], flat[2], decode, tuple(chunks))


def _decode_group(
    rows: Sequence[Row], max_len: int, group_size: int, dtype: torch.dtype, device: torch.device
) -> DecodeGroup:
    num_rows = max(row.slot for row in rows) + 1
    width = max(len(row.token_ids) for row in rows)
    length = max(row.end for row in rows)
    if dtype == torch.bfloat16 and device.type == "cpu":
        # A kernel of its own serves a single token, and sums end elsewhere for other lengths. Rounded up, a row's
        # result hardly ever depends on its neighbours or on how much is drafted (docs/log.md).
        width, length = max(width, 2), min(-(-length // LENGTH_STEP) * LENGTH_STEP, max_len)
    pad = [row.slot * width + i for row in rows for i in range(len(row.token_ids))]
    # Places without a token (holes, short rows) stand at position 0: they see one key, so no softmax is over nothing.
    position = [0] * (num_rows * width)
    for row in rows:
        position[row.slot * width : row.slot * width + len(row.token_ids)] = range(row.start, row.end)
    mask = None
    if position != [length - 1] * (num_rows * width):
        at = torch.tensor(position, device=device)
        mask = _causal(at, length, group_size, dtype).view(num_rows, 1, width * group_size, length)
    index = None if pad == list(range(num_rows * width)) else torch.tensor(pad, device=device)
    return DecodeGroup(len(pad), num_rows, width, length, index, mask)


def _causal(positions: Tensor, length: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """[T * group_size, length]: 0 where a key is at or before the query's position, -inf after it."""
    hidden = torch.arange(length, device=positions.device) > positions.repeat_interleave(group_size)[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, float("-inf"))
