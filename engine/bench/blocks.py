"""What was measured, and the figures made of it.

A block is a set of prompts that every policy serves once, one policy after the other in random order; so what the
machine does meanwhile hits all of them, and ratios are taken within blocks. Intervals resample blocks (or requests, for
what a request has of its own) with replacement: percentile bootstrap, Efron 1979.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.bench.report import Figure, quantile_figure
from engine.runner.request import RequestResult

NONE = "none"
RESAMPLES = 4_000


@dataclass(frozen=True, slots=True)
class Run:
    """One block under one policy: ``tokens`` generated in ``seconds``, by ``cpu_s`` of this process."""

    tokens: int
    seconds: float
    cpu_s: float = 0.0
    results: tuple[RequestResult, ...] = ()


Block = Mapping[str, Run]
"""Policy → its run."""


def ratio_figure(name: str, blocks: Sequence[tuple[Run, Run]], rng: np.random.Generator) -> Figure:
    """Tokens per second of the first over those of the second, over paired blocks."""
    table = np.array([(a.tokens, a.seconds, b.tokens, b.seconds) for a, b in blocks], float)

    def ratio(sums: np.ndarray) -> np.ndarray:
        return (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])

    return _figure(name, table, ratio, "x", rng)


def best_figure(name: str, blocks: Sequence[Block], rng: np.random.Generator) -> Figure:
    """The best policy over plain decoding. Which is best is decided, for each block, by all the other blocks."""
    pairs = []
    for i, block in enumerate(blocks):
        others = [other for j, other in enumerate(blocks) if j != i] or [block]
        best = max(block.keys() - {NONE}, key=lambda policy: _rate([other[policy] for other in others]))
        pairs.append((block[best], block[NONE]))
    return ratio_figure(name, pairs, rng)


def rate_figures(label: str, runs: Sequence[Run], rng: np.random.Generator) -> list[Figure]:
    """Tokens per second, CPU seconds per 1,000 tokens, TTFT and TPOT quantiles, of one policy under ``label``."""
    table = np.array([(run.tokens, run.seconds, run.cpu_s) for run in runs], float)
    results = [result for run in runs for result in run.results]
    figures = [
        _figure(f"tokens_per_s:{label}", table, lambda s: s[..., 0] / s[..., 1], "tokens/s", rng),
        _figure(f"cpu_s_per_1000:{label}", table, lambda s: 1e3 * s[..., 2] / s[..., 0], "s", rng),
    ]
    for metric in ("ttft", "tpot"):
        values = [1e3 * v for r in results if (v := getattr(r, f"{metric}_s")) is not None]
        if values:
            figures += [
                quantile_figure(f"{metric}_p{round(100 * q)}:{label}", values, q, "ms", rng) for q in (0.5, 0.95, 0.99)
            ]
    return figures


def speculation_figures(label: str, runs: Sequence[Run], rng: np.random.Generator) -> list[Figure]:
    """Acceptance length (bonus included), unconditional acceptance by position, and K control's guesses."""
    results = [result for run in runs for result in run.results if result.counts.steps]
    positions = max((len(r.counts.accepted_per_pos) for r in results), default=0)
    if not results:
        return []
    table = np.array([(r.counts.steps, r.counts.accepted, r.expected_accepted, r.plain_s, r.cost_s,
                       r.expected_plain_s, r.expected_cost_s,
                       *(r.counts.accepted_per_pos[i] if i < len(r.counts.accepted_per_pos) else 0
                         for i in range(positions))) for r in results], float)  # fmt: skip
    figures = [
        _figure(f"acceptance_length:{label}", table, lambda s: 1 + s[..., 1] / s[..., 0], "tokens/step", rng),
    ]
    if table[:, 1].sum() and table[:, 2].sum():
        figures.append(_figure(f"accepted/expected:{label}", table, lambda s: s[..., 1] / s[..., 2], "x", rng))
    if table[:, 3].sum():
        figures.append(_figure(f"predicted_gain:{label}", table, lambda s: s[..., 5] / s[..., 6], "x", rng))
        figures.append(_figure(f"observed_gain:{label}", table, lambda s: s[..., 3] / s[..., 4], "x", rng))
    for i in range(positions):
        figures.append(
            _figure(f"accepted_at_{i + 1}:{label}", table, lambda s, i=i: s[..., 7 + i] / s[..., 0], "share", rng)
        )
    return figures


def _rate(runs: Sequence[Run]) -> float:
    return sum(run.tokens for run in runs) / sum(run.seconds for run in runs)


def _figure(name: str, table: np.ndarray, of_sums, unit: str, rng: np.random.Generator) -> Figure:  # type: ignore[no-untyped-def]
    """A function of column sums with its interval; ``table`` [observations, columns]."""
    n = len(table)
    picks = rng.multinomial(n, np.full(n, 1.0 / n), size=RESAMPLES)  # how often each row is drawn
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.nanquantile(of_sums(picks @ table), [0.025, 0.975])
    return Figure(name, float(of_sums(table.sum(0))), float(low), float(high), n, unit)
