"""Latencies in paired blocks: the same requests with something at work beside the engine and without it, in random
order within each pair, so that what the machine does meanwhile hits both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np

from engine.bench.report import Figure
from engine.demo.prompts import Prompt
from engine.demo.traffic import ask

RESAMPLES = 2_000


def serve(pool: ThreadPoolExecutor, url: str, model: str, sent: Sequence[Prompt], tokens: int) -> list[float]:
    """Seconds of each request, as many at a time as the pool has threads."""
    with httpx.Client(base_url=url, timeout=120) as client:

        def one(prompt: Prompt) -> float:
            began = time.perf_counter()
            ask(client, model, prompt, f"{time.time_ns():x}", stream=True, max_tokens=tokens)
            return time.perf_counter() - began

        return list(pool.map(one, sent))


def ratios(
    name: str, pairs: Sequence[tuple[Sequence[float], Sequence[float]]], qs: Sequence[float], rng: np.random.Generator
) -> list[Figure]:
    """ "ratio:p95:NAME" for each quantile: over all requests of the first of each pair ÷ of the second; intervals
    resample pairs."""
    first, second = (np.array([pair[side] for pair in pairs]) for side in (0, 1))  # [pairs, requests]
    picks = rng.integers(0, len(pairs), (RESAMPLES, len(pairs)))
    found = []
    for q in qs:
        resampled = [np.quantile(first[p], q) / np.quantile(second[p], q) for p in picks]
        low, high = np.quantile(resampled, (0.025, 0.975))
        value = float(np.quantile(first, q) / np.quantile(second, q))
        found.append(Figure(f"ratio:p{q * 100:g}:{name}", value, float(low), float(high), first.size, "x"))
    return found


def share(name: str, blocks: Sequence[tuple[float, float]], unit: str, rng: np.random.Generator) -> Figure:
    """The sum of the first of each block ÷ that of the second; the interval resamples blocks."""
    table = np.array(blocks, float)  # [blocks, 2]
    sums = table[rng.integers(0, len(table), (RESAMPLES, len(table)))].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], (0.025, 0.975))
    whole = table.sum(axis=0)
    return Figure(name, float(whole[0] / whole[1]), float(low), float(high), len(table), unit)
