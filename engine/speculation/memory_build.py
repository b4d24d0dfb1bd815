"""Building a trace memory from past responses: counted with numpy, bounded in bytes, the same bytes every time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

COLUMNS: dict[str, type[np.generic]] = {"key": np.uint64, "token": np.uint32, "count": np.uint32, "total": np.uint32}
MIN_ORDER, MAX_ORDER = 1, 6
"""Lengths of n-grams that can be kept."""
POOLED = "*"
"""The table of all classes together: what a class has not seen itself. No client can name a class so."""
BYTES_PER_ENTRY = 20
HEADER_BYTES_PER_CLASS = 512
"""Room for the file's header: four names with offsets, and the alignment."""

_MASK = (1 << 64) - 1
_MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: a bijection of 64-bit words
_SEEDS = [n * 0xD1B54A32D192ED03 & _MASK for n in range(MAX_ORDER + 1)]
"""A beginning of its own for every length, far from any token id: from a small one, an n-gram of small ids can come by
way of 0 to the beginning of a shorter one."""


def ngram_hash(tokens: Sequence[int]) -> int:
    """64-bit hash of an n-gram, its length included. With a million entries a false match has odds of 1 in 10^13."""
    h = _SEEDS[len(tokens)]
    for token in tokens:
        h = ((h ^ token) * _MULTIPLIER) & _MASK
        h ^= h >> 29
    return h


def _hash_columns(columns: Sequence[np.ndarray]) -> np.ndarray:
    """``ngram_hash`` of many n-grams at once; ``columns[i]`` holds the i-th token of each, uint64."""
    h = np.full(columns[0].shape, _SEEDS[len(columns)], np.uint64)
    for column in columns:
        h = (h ^ column) * np.uint64(_MULTIPLIER)
        h ^= h >> np.uint64(29)
    return h


@dataclass(frozen=True, slots=True)
class PairCounts:
    """How often which token followed which n-gram: sorted by key, then token, each pair once."""

    key: np.ndarray  # [n] uint64
    token: np.ndarray  # [n] uint32
    count: np.ndarray  # [n] int64


def count_pairs(responses: Iterable[tuple[Sequence[int], Sequence[int]]], min_n: int, max_n: int) -> PairCounts:
    """What followed what in these (prompt, response) pairs. Keys may begin in the prompt; tokens are the response's."""
    keys, nexts = [np.empty(0, np.uint64)], [np.empty(0, np.uint32)]
    for prompt_ids, output_ids in responses:
        tail = list(prompt_ids[-max_n:])
        tokens = np.array(tail + list(output_ids), np.uint64)
        for n in range(min_n, max_n + 1):
            first = max(len(tail), n)  # the first response token that has n tokens before it
            count = len(tokens) - first
            if count > 0:
                keys.append(_hash_columns([tokens[first - n + i : first - n + i + count] for i in range(n)]))
                nexts.append(tokens[first:].astype(np.uint32))
    key = np.concatenate(keys)
    return _summed(key, np.concatenate(nexts), np.ones(len(key), np.int64))


def add_up(parts: Sequence[tuple[PairCounts, int]]) -> PairCounts:
    """The weighted sum; whole numbers, so the order of the parts does not matter."""
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    columns = zip(*((p.key, p.token, p.count * weight) for p, weight in parts), strict=True)
    return _summed(*(np.concatenate(column) for column in columns))


def write_memory(classes: Mapping[str, PairCounts], max_bytes: int) -> bytes:
    """The safetensors file, at most ``max_bytes`` long; the entries seen least often are left out first."""
    from safetensors.numpy import save

    names = sorted(name for name, pairs in classes.items() if len(pairs.key))
    tables = [_tabulate(classes[name]) for name in names]
    room = max(0, (max_bytes - HEADER_BYTES_PER_CLASS * max(1, len(names))) // BYTES_PER_ENTRY)
    arrays: dict[str, np.ndarray] = {}
    for name, table, keep in zip(names, tables, _most_seen(tables, room), strict=True):
        for column, values in table.items():
            arrays[f"{name}/{column}"] = np.ascontiguousarray(values[keep])
    data = save(arrays)
    assert len(data) <= max(max_bytes, HEADER_BYTES_PER_CLASS * max(1, len(names)))
    return data


def _summed(keys: np.ndarray, tokens: np.ndarray, counts: np.ndarray) -> PairCounts:
    if not len(keys):
        return PairCounts(keys.astype(np.uint64), tokens.astype(np.uint32), counts.astype(np.int64))
    order = np.lexsort((tokens, keys))
    keys, tokens, counts = keys[order], tokens[order], counts[order]
    fresh = np.r_[True, (keys[1:] != keys[:-1]) | (tokens[1:] != tokens[:-1])]  # first of its (key, token)
    starts = np.flatnonzero(fresh)
    return PairCounts(keys[starts], tokens[starts], np.add.reduceat(counts, starts))


def _tabulate(pairs: PairCounts) -> dict[str, np.ndarray]:
    """One row per key, keys ascending: its most frequent next token (the smallest id among equals)."""
    groups = np.flatnonzero(np.r_[True, pairs.key[1:] != pairs.key[:-1]])  # first of its key
    best = np.lexsort((pairs.token, -pairs.count, pairs.key))[groups]
    return {
        "key": pairs.key[groups],
        "token": pairs.token[best],
        "count": pairs.count[best].astype(np.uint32),
        "total": np.add.reduceat(pairs.count, groups).astype(np.uint32),
    }


def _most_seen(tables: Sequence[dict[str, np.ndarray]], room: int) -> list[np.ndarray]:
    """For each table a mask of the rows to keep, ``room`` rows in all: highest count first, then fewest rivals."""
    if not tables:
        return []
    which = np.concatenate([np.full(len(table["key"]), i) for i, table in enumerate(tables)])
    count, total, key = (np.concatenate([table[name] for table in tables]) for name in ("count", "total", "key"))
    if len(which) <= room:
        return [np.ones(len(table["key"]), bool) for table in tables]
    limit = np.partition(count, len(count) - room)[len(count) - room] if room else count.max() + 1
    keep = count > limit
    tied = np.flatnonzero(count == limit)
    order = np.lexsort((which[tied], key[tied], total[tied]))
    keep[tied[order[: room - int(keep.sum())]]] = True
    return [keep[which == i] for i in range(len(tables))]
