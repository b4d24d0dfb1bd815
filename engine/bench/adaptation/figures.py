"""From served requests to figures. Intervals resample prompts, with everything that every seed did to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.bench.adaptation.arms import Served
from engine.bench.adaptation.streams import Stream
from engine.bench.report import Figure

RESAMPLES = 2_000
WINDOW = 16
"""Requests over which a level is judged: one request says little."""
RECOVERED = 0.9
RETURN = 10


@dataclass(frozen=True, slots=True)
class Run:
    """One stream under one seed: what every arm did with every request of it, in order."""

    stream: Stream
    seed: int
    arms: Mapping[str, Sequence[Served]]
    offline: Mapping[int, Served]
    """By place in the stream: the same request under a policy that was trained offline on its class."""


Pair = tuple[float, float, float, float]
"""(tokens, seconds) of the first arm, then of the second."""


def ratio(name: str, rows: Sequence[tuple[object, Pair]], rng: np.random.Generator) -> Figure:
    """Tokens per second of the first over the second; ``rows`` are (prompt, sums)."""
    return _figure(name, rows, lambda s: (s[..., 0] / s[..., 1]) / (s[..., 2] / s[..., 3]), "x", rng)


def pairs(run: Run, first: str, second: str, where: Sequence[int], charged: bool) -> list[tuple[object, Pair]]:
    """Of the requests at these places. ``charged``: the seconds of learning count as well, those of the whole stream
    shared by its requests equally."""
    found: list[tuple[object, Pair]] = []
    rest = {name: sum(s.learn_s for s in run.arms[name]) / len(run.arms[name]) if charged else 0.0 for name in run.arms}
    for at in where:
        a, b = run.arms[first][at], run.arms[second][at]
        row = (float(a.tokens), a.decode_s + rest[first], float(b.tokens), b.decode_s + rest[second])
        found.append((run.stream.requests[at].prompt_ids, row))
    return found


def recovery(runs: Sequence[Run], arm: str, traffic_class: str) -> Figure | None:
    """Requests after the shift to a class until the arm, over ``WINDOW`` requests from there, reaches 90 % of what a
    policy trained offline on the class earns on the very same requests; the whole phase for a seed that does not."""
    found = []
    for run in runs:
        for phase in run.stream.phases[1:]:
            if phase.traffic_class != traffic_class or phase.last - phase.first < WINDOW:
                continue
            reached = phase.last - phase.first
            for end in range(phase.first + WINDOW, phase.last + 1):
                where = range(end - WINDOW, end)
                if _rate([run.arms[arm][i] for i in where]) >= RECOVERED * _rate([run.offline[i] for i in where]):
                    reached = end - phase.first - WINDOW
                    break
            found.append(reached)
    if not found:
        return None
    name = f"recovery_requests:shift:{traffic_class}"
    return Figure(name, float(np.mean(found)), float(min(found)), float(max(found)), len(found), "requests")


def regret(runs: Sequence[Run], arm: str) -> Figure:
    """Area under the regret curve, in requests: Σ (1 - time offline training would have taken / time taken)."""
    found = [
        sum(1.0 - run.offline[i].decode_s / one.decode_s for i, one in enumerate(run.arms[arm]) if one.decode_s > 0)
        for run in runs
    ]
    return Figure(f"regret:{arm}:shift", float(np.mean(found)), min(found), max(found), len(found), "requests")


def lost(name: str, rows: Sequence[tuple[object, Pair]], rng: np.random.Generator) -> Figure:
    """Share of acceptance length lost; ``rows``: the same requests under the later version, then under the earlier, as
    (tokens, steps) each."""
    return _figure(name, rows, share_lost, "share", rng)


def share_lost(sums: np.ndarray) -> np.ndarray:
    """[…, 4] → […]."""
    return 1 - (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])


def level(name: str, run: Run, arm: str) -> list[tuple[int, float, float]]:
    """(request, acceptance length, net tokens/s) over the last ``WINDOW`` requests: what a chart shows."""
    served, found = run.arms[arm], []
    for end in range(WINDOW, len(served) + 1):
        part = served[end - WINDOW : end]
        seconds = sum(s.decode_s + s.learn_s for s in part)
        found.append((end, _length(part), sum(s.tokens for s in part) / seconds))
    return found


def _figure(
    name: str, rows: Sequence[tuple[object, Pair]], of: Callable[[np.ndarray], np.ndarray], unit: str,
    rng: np.random.Generator,
) -> Figure:  # fmt: skip
    by_prompt: dict[object, np.ndarray] = {}
    for prompt, row in rows:
        by_prompt[prompt] = by_prompt.get(prompt, np.zeros(4)) + np.array(row)
    table = np.array(list(by_prompt.values()))
    sums = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), size=RESAMPLES) @ table
    low, high = np.quantile(of(sums), (0.025, 0.975))
    return Figure(name, float(of(table.sum(0))), float(low), float(high), len(table), unit)


def _rate(served: Sequence[Served]) -> float:
    return sum(s.tokens for s in served) / max(1e-9, sum(s.decode_s for s in served))


def _length(served: Sequence[Served]) -> float:
    return sum(s.tokens for s in served) / max(1, sum(s.counts.steps for s in served))
