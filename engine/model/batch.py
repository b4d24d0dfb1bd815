"""One target pass as tensors: flat tokens for the linear layers, groups of them for attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from engine.model.staged import upload


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """The decode rows that attend together, padded to [rows, width].

    ``tokens`` [n] are their flat tokens, None where these are the first ``num_tokens``. ``pad`` [n] is the place of
    each in the padded [rows * width] and ``filled`` [rows * width] the token that stands at each place (anybody's where
    there is none: nobody reads what comes of it), both None where that is the identity; ``mask``
    [rows, 1, width * group_size, length], 0 or -inf, None where every key counts.
    """

    num_tokens: int
    tokens: Tensor | None
    rows: int
    width: int
    length: int
    pad: Tensor | None
    filled: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class LoneGroup:
    """A row that attends alone, a prompt's chunk or a long draft: flat tokens [first, last), ``length`` keys.

    ``mask`` [last - first times group_size, length], 0 or -inf.
    """

    first: int
    last: int
    slot: int
    length: int
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """``token_ids``, ``positions``, ``places`` [N], int64; ``places`` are flat KV cache places.

    The tokens of decode rows come first; rows with much longer drafts than others are ``lone``.
    Without groups, ``decode``, ``lone`` and ``prefills`` are empty: every token attends by itself.
    """

    token_ids: Tensor
    positions: Tensor
    places: Tensor
    decode: DecodeGroup | None
    lone: tuple[LoneGroup, ...]
    prefills: tuple[LoneGroup, ...]


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
"""bfloat16 on a CPU: lengths are rounded up to this and rows padded to two tokens. A kernel of its own serves a single
token, and sums end elsewhere for other lengths; so a row's result hardly ever depends on its neighbours or on how much
is drafted (docs/log.md)."""
LONE_COST = 4


def build_batch(
    decodes: Sequence[Row],
    prefills: Sequence[Row],
    max_len: int,
    group_size: int,
    dtype: torch.dtype,
    device: torch.device,
    grouped: bool = True,
) -> Batch:
    """Lay out the rows of one pass; ``max_len`` is the cache's, ``group_size`` the query heads per kv head.

    ``grouped``: which tokens attend together is said, as torch must know it.
    """
    rounded = dtype == torch.bfloat16 and device.type == "cpu"
    rows = [*decodes, *prefills]
    ids = [token for row in rows for token in row.token_ids]
    positions = [position for row in rows for position in range(row.start, row.end)]
    places = [row.slot * max_len + position for row in rows for position in range(row.start, row.end)]
    flat = upload([ids, positions, places], torch.int64, device)
    if not grouped:
        return Batch(flat[0], flat[1], flat[2], None, (), ())

    def lone(row: Row, first: int, length: int) -> LoneGroup:
        last = first + len(row.token_ids)
        return LoneGroup(first, last, row.slot, length, causal_mask(flat[1, first:last], length, group_size, dtype))

    firsts = list(accumulate((len(row.token_ids) for row in rows), initial=0))
    width = _shared_width([(row.slot, len(row.token_ids)) for row in decodes], 2 if rounded else 1)
    ends = [_rounded(row.end, max_len) if rounded else row.end for row in decodes]
    wide = [i for i, row in enumerate(decodes) if len(row.token_ids) > width]
    narrow = [i for i, row in enumerate(decodes) if len(row.token_ids) <= width]
    decode = None
    if narrow:
        spans = [range(firsts[i], firsts[i + 1]) for i in narrow] if wide else None
        decode = _decode_group(
            [decodes[i] for i in narrow], spans, width, max(ends[i] for i in narrow), group_size, dtype, device
        )
    return Batch(
        flat[0],
        flat[1],
        flat[2],
        decode,
        tuple(lone(decodes[i], firsts[i], ends[i]) for i in wide),
        tuple(lone(row, first, row.end) for row, first in zip(prefills, firsts[len(decodes) :], strict=False)),
    )


def _rounded(length: int, max_len: int) -> int:
    return min(-(-length // LENGTH_STEP) * LENGTH_STEP, max_len)


def _shared_width(rows: Sequence[tuple[int, int]], least: int) -> int:
    """Up to how many tokens rows (slot, tokens) attend together, padded to it; longer ones attend alone.

    The choice that costs least, in padded tokens: a call of its own costs as much as ``LONE_COST`` of them.
    """

    def cost(width: int) -> int:
        slots = 1 + max((slot for slot, tokens in rows if tokens <= width), default=-1)
        return slots * width + sum(LONE_COST + tokens for _, tokens in rows if tokens > width)

    return min(sorted({least} | {tokens for _, tokens in rows if tokens > least}), key=cost)


def _decode_group(
    rows: Sequence[Row],
    spans: Sequence[range] | None,
    width: int,
    length: int,
    group_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> DecodeGroup:
    num_rows = max(row.slot for row in rows) + 1
    pad = [row.slot * width + i for row in rows for i in range(len(row.token_ids))]
    # Places without a token (holes, short rows) stand at position 0: they see one key, so no softmax is over nothing.
    position = [0] * (num_rows * width)
    for row in rows:
        position[row.slot * width : row.slot * width + len(row.token_ids)] = range(row.start, row.end)
    mask = None
    if position != [length - 1] * (num_rows * width):
        at = upload(position, torch.int64, device)
        mask = causal_mask(at, length, group_size, dtype).view(num_rows, 1, width * group_size, length)
    index = filled = None
    if pad != list(range(num_rows * width)):
        at_place = [0] * (num_rows * width)
        for token, place in enumerate(pad):
            at_place[place] = token
        index, filled = upload(pad, torch.int64, device), upload(at_place, torch.int64, device)
    tokens = None if spans is None else upload([at for span in spans for at in span], torch.int64, device)
    return DecodeGroup(len(pad), tokens, num_rows, width, length, index, filled, mask)


def causal_mask(positions: Tensor, length: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """[T * group_size, length]: 0 where a key is at or before the query's position, -inf after it."""
    at = positions[:, None].expand(-1, group_size).reshape(-1, 1)
    hidden = torch.arange(length, device=positions.device) > at
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, float("-inf"))
