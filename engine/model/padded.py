"""Rows padded to a few sizes, on storage that stays: what a captured pass reads.

A row stands at its slot, as attention reads the cache (``kv_cache``). A place without a token is at position 0, so it
sees one key and no softmax is over nothing, and is written to the place that belongs to nobody.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.contracts import SlipstreamError
from engine.model.batch import Batch, DecodeGroup, Row, causal_mask
from engine.model.kv_cache import KVCache
from engine.model.staged import Staged

WIDTHS = (1, 3, 5, 9, 17, 33)
"""Tokens of a row: an input and up to 2, 4, 8, 16, 32 drafted ones. No policy drafts more in a step."""
LEAST_LENGTH = 256


@dataclass(frozen=True, slots=True)
class Bucket:
    """``rows`` × ``width`` tokens over the first ``length`` keys of each row."""

    rows: int
    width: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.width


class PaddedRows:
    """The inputs of passes over one cache: views of one buffer, which a single copy fills."""

    def __init__(self, cache: KVCache, group_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """``group_size``: query heads per kv head; ``dtype`` of the mask."""
        self._cache, self._group_size, self._dtype = cache, group_size, dtype
        self.most_tokens = cache.num_slots * WIDTHS[-1]
        self._inputs = Staged(3 * self.most_tokens + cache.num_slots, torch.int64, device)

    def buckets(self, most_width: int) -> list[Bucket]:
        """All there are for rows of up to ``most_width`` tokens, the largest first: the smaller fit into its memory."""
        most = self._cache
        sizes = itertools.product(range(1, most.num_slots + 1), range(1, most_width + 1), _lengths(most.max_len))
        found = {self.bucket_of(*size) for size in sizes}
        return sorted(found, key=lambda b: (b.tokens, b.length), reverse=True)

    def bucket(self, rows: Sequence[Row], beyond: int = 0) -> Bucket:
        """The smallest that holds ``rows`` and ``beyond`` more keys of each."""
        return self.bucket_of(
            1 + max(row.slot for row in rows),
            max(len(row.token_ids) for row in rows),
            min(max(row.end for row in rows) + beyond, self._cache.max_len),
        )

    def bucket_of(self, rows: int, width: int, length: int) -> Bucket:
        """The smallest with at least so many rows, tokens of a row and keys."""
        most = self._cache
        if rows > most.num_slots or width > WIDTHS[-1] or length > most.max_len:
            raise SlipstreamError(
                f"No captured pass has {rows} rows of {width} tokens over {length} keys: there are {most.num_slots} "
                f"rows of {WIDTHS[-1]} over {most.max_len} at most."
            )
        return Bucket(
            min(_doubled(1, rows), most.num_slots),
            next(w for w in WIDTHS if w >= width),
            min(_doubled(LEAST_LENGTH, length), most.max_len),
        )

    def fill(self, bucket: Bucket, rows: Sequence[Row]) -> None:
        """Put ``rows`` in; every other place is padding."""
        n, width, host = bucket.tokens, bucket.width, self._inputs.host
        host[: 2 * n] = 0
        host[2 * n : 3 * n] = self._cache.nowhere
        host[3 * n : 3 * n + bucket.rows] = 0
        for row in rows:
            count, at = len(row.token_ids), row.slot * width
            first = row.slot * self._cache.max_len
            host[at : at + count] = row.token_ids
            host[n + at : n + at + count] = range(row.start, row.end)
            host[2 * n + at : 2 * n + at + count] = range(first + row.start, first + row.end)
            host[3 * n + row.slot] = count
        self._inputs.send(3 * n + bucket.rows)

    def park(self, bucket: Bucket) -> None:
        """Nothing but padding. On the device: what was sent may still be on its way."""
        n = bucket.tokens
        self._inputs.device[: 3 * n + bucket.rows].zero_()
        self._inputs.device[2 * n : 3 * n].fill_(self._cache.nowhere)

    def counts(self, bucket: Bucket) -> Tensor:
        """Tokens of each row [rows], int64, 0 where there is none."""
        return self._inputs.device[3 * bucket.tokens :][: bucket.rows]

    def token_ids(self, bucket: Bucket) -> Tensor:
        """Token ids [rows, width], int64."""
        return self._inputs.device[: bucket.tokens].view(bucket.rows, bucket.width)

    def batch(self, bucket: Bucket) -> Batch:
        """All places as one batch. Inside a capture: the mask is made of the positions there."""
        n = bucket.tokens
        token_ids, positions, places = self._inputs.device[: 3 * n].view(3, n).unbind(0)
        return padded_batch(token_ids, positions, places, bucket, self._group_size, self._dtype)


def padded_batch(
    token_ids: Tensor, positions: Tensor, places: Tensor, bucket: Bucket, group_size: int, dtype: torch.dtype
) -> Batch:
    """A batch of all [rows * width] places of ``bucket``: nothing is gathered, no shape depends on what is in it."""
    rows, width, length = bucket.rows, bucket.width, bucket.length
    mask = causal_mask(positions, length, group_size, dtype).view(rows, 1, width * group_size, length)
    group = DecodeGroup(bucket.tokens, None, rows, width, length, None, None, mask)
    return Batch(token_ids, positions, places, group, (), ())


def _lengths(longest: int) -> list[int]:
    found = [LEAST_LENGTH]
    while found[-1] < longest:
        found.append(2 * found[-1])
    return [min(length, longest) for length in found]


def _doubled(least: int, wanted: int) -> int:
    while least < wanted:
        least *= 2
    return least
