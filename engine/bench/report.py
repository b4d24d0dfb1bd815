"""What every benchmark prints: one JSON object of figures, each with its interval and what it rests on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class Figure:
    """``low`` and ``high`` are the 95 % interval of ``value``, ``n`` the number of observations it rests on."""

    name: str
    value: float
    low: float
    high: float
    n: int
    unit: str


@dataclass(frozen=True, slots=True)
class Report:
    """``notes`` say in words what no figure can."""

    bench: str
    seed: int
    figures: Sequence[Figure]
    notes: Sequence[str] = ()

    def to_json(self) -> str:
        return json.dumps(
            {
                "bench": self.bench,
                "version": metadata.version("slipstream"),
                "machine": machine(),
                "seed": self.seed,
                "figures": [asdict(figure) for figure in self.figures],
                "notes": list(self.notes),
            }
        )

    def to_text(self) -> str:
        rows = [f"{'figure':44} {'value':>10} {'95 % interval':>23} {'n':>6}  unit"]
        rows += [
            f"{f.name:44} {f.value:10.4g} {f'{f.low:.4g} – {f.high:.4g}':>23} {f.n:6}  {f.unit}" for f in self.figures
        ]
        return "\n".join([*rows, *self.notes])


def quantile_figure(name: str, values: Sequence[float], q: float, unit: str, rng: np.random.Generator) -> Figure:
    """A sample quantile with its percentile-bootstrap interval (Efron 1979; 2,000 resamples).

    No resample exceeds the largest observation: for p99 of n = 50 ``high`` is that maximum, not a bound on the truth.
    """
    sample = np.asarray(values, dtype=float)
    resampled = np.quantile(rng.choice(sample, size=(2_000, len(sample))), q, axis=1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Figure(name, float(np.quantile(sample, q)), float(low), float(high), len(sample), unit)


def count_figure(name: str, events: int, trials: int, unit: str) -> Figure:
    """A count of events among trials with its Clopper–Pearson interval, as counts."""
    from scipy.stats import binomtest

    if trials == 0:
        return Figure(name, 0.0, 0.0, 0.0, 0, unit)
    if events > trials:  # more than can be counted in trials: certain, and out of all proportion
        return Figure(name, float(events), float(trials), float("inf"), trials, unit)
    interval = binomtest(events, trials).proportion_ci(method="exact")
    return Figure(name, float(events), float(interval.low * trials), float(interval.high * trials), trials, unit)


def share_figure(name: str, events: int, trials: int) -> Figure:
    """A share with its Clopper–Pearson interval."""
    from scipy.stats import binomtest

    interval = binomtest(events, trials).proportion_ci(method="exact")
    return Figure(name, events / trials, float(interval.low), float(interval.high), trials, "share")


def machine() -> str:
    """Processor, cores this process may use, memory: what the figures were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
