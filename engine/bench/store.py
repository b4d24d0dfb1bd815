"""What the trace store costs at scale: every panel query of every page, ingest, visibility, and the rollups' error.

Traces are made up set-based over thirty days, in two steps of a tenth and of all, so that growth is measured in one
run, beside rollouts with their decisions. Everything happens in a database of its own, which is thrown away, or stays
in a folder for the next run and for `bench dashboard`: what is there already is measured as it is, without growth.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from engine.bench import ingest
from engine.bench.report import Figure, Report, quantile_figure
from engine.bench.seeded import DAYS, scratch, top_up
from engine.ops.supervisor import Say
from engine.settings import Settings
from engine.store.database import Database
from engine.store.panels import PANELS
from engine.store.repositories import audit, overview, partitions, seeding
from engine.store.repositories.overview import Slice

REPEATS = 3
WINDOWS = {"1h": timedelta(hours=1), "24h": timedelta(hours=24), "7d": timedelta(days=7), "30d": timedelta(days=30)}
QS = (0.5, 0.9, 0.95, 0.99, 0.999)
DURATIONS = ("ttft", "tpot", "e2e", "queue")


@dataclass(frozen=True, slots=True)
class Options:
    """``rate`` traces per second are offered for ``seconds`` (0: ingest is not measured). ``keep`` is a folder whose
    database stays, and is used again."""

    traces: int = 100_000
    rate: int = 5_000
    seconds: float = 60.0
    keep: Path | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """One run of one panel's query, and how many rows it gave."""

    panel: str
    window: str
    filtered: bool
    ms: float
    rows: int

    @property
    def question(self) -> tuple[str, str, bool]:
        return self.panel, self.window, self.filtered


def run(settings: Settings, options: Options, say: Say) -> Report:
    rng, traces, telemetry = np.random.default_rng(options.seed), options.traces, settings.telemetry
    with scratch(say, options.keep) as database:
        end, small = datetime.now(UTC), max(traces // 10, 1)
        with database.read() as session:
            is_empty = audit.traces(session) == 0
        before = list[Timing]()
        if is_empty:
            top_up(database, telemetry, small, end, options.seed, say)
            before = time_panels(database, end)
        top_up(database, telemetry, traces, end, options.seed, say)
        after = time_panels(database, end)
        _tell(after, say)
        with database.read() as session:
            size, total = sum(size for _, _, size in partitions.existing(session)), audit.traces(session)
        month = Slice(end - timedelta(days=DAYS), end)
        raw = [_raw_ms(database, month) for _ in range(REPEATS)]
        error, values = _relative_error(database, month)
        figures = [
            *panel_figures(before, after, rng),
            quantile_figure("raw_ms", raw, 0.5, "ms", rng),
            Figure("rollup_relative_error_max", error, error, error, values, "of the value"),
            Figure("stored_traces", total, total, total, total, "traces"),
            Figure("stored_bytes", size, size, size, total, "bytes"),
        ]
        notes = _notes(before, after)
        if options.seconds:
            say(Report("store", options.seed, figures, notes).to_text())
            say(f"ingest: {options.rate:,} traces/s for {options.seconds:.0f} s")
            figures += ingest.measure(database, options.rate, options.seconds, rng, say)
        return Report("store", options.seed, figures, notes)


def time_panels(database: Database, end: datetime) -> list[Timing]:
    """Every panel over every window, unfiltered and of one class, each after one run that warms it up."""
    found = []
    for window, length in WINDOWS.items():
        for traffic_class in (None, "code"):
            part = Slice(end - length, end, traffic_class=traffic_class)
            for name, panel in PANELS.items():
                for attempt in range(REPEATS + 1):
                    with database.read() as session:
                        began = time.perf_counter()
                        rows = panel.read(session, part)
                        took = (time.perf_counter() - began) * 1e3
                    if attempt:
                        found.append(Timing(name, window, traffic_class is not None, took, len(rows)))
    return found


def panel_figures(before: Sequence[Timing], after: Sequence[Timing], rng: np.random.Generator) -> list[Figure]:
    """Over the questions that had an answer: one about an empty table costs nothing, and would say that all are cheap.

    Growth is of the same questions in both steps; there is none where only one was timed.
    """
    ms = [t.ms for t in after if t.rows]
    found = [quantile_figure(f"panel_ms_p{q * 100:g}", ms, q, "ms", rng) for q in (0.95, 0.5)]
    both = set.intersection(*({t.question for t in timings if t.rows} for timings in (before, after)))
    small, whole = ([t.ms for t in timings if t.question in both] for timings in (before, after))
    return [*found, _growth(small, whole, rng)] if both else found


def _notes(before: Sequence[Timing], after: Sequence[Timing]) -> list[str]:
    empty = sorted({t.panel for t in after} - {t.panel for t in after if t.rows})
    said = [f"Without a row, and not counted: {', '.join(empty)}."] if empty else []
    return said if before else [*said, "The database was there already: no growth. An empty --keep DIR measures it."]


def _raw_ms(database: Database, part: Slice) -> float:
    """The same question as one panel, p50, p95 and p99 of a month, asked of the traces themselves."""
    with database.read() as session:
        began = time.perf_counter()
        audit.raw_quantiles(session, part, "e2e", (0.5, 0.95, 0.99))
        return (time.perf_counter() - began) * 1e3


def _relative_error(database: Database, part: Slice) -> tuple[float, int]:
    """The largest relative error of a percentile from rollups against the raw traces, over metrics and classes."""
    # Rollups count by the minute: the oracle must look at the same whole minutes.
    whole = replace(part, since=part.since.replace(second=0, microsecond=0) + timedelta(minutes=1))
    worst, count = 0.0, 0
    with database.read() as session:
        for traffic_class in (None, *seeding.CLASSES):
            chosen = replace(whole, traffic_class=traffic_class)
            for metric in DURATIONS:
                (found,) = overview.quantiles(session, chosen, metric, QS)
                for q, exact in zip(QS, audit.raw_quantiles(session, chosen, metric, QS), strict=True):
                    worst = max(worst, abs(found[f"q{q * 100:g}"] - exact) / exact)
                    count += 1
    return worst, count


def _growth(small: Sequence[float], whole: Sequence[float], rng: np.random.Generator) -> Figure:
    """The ratio of the two p95, with its bootstrap interval."""
    resampled = [_p95(rng.choice(whole, len(whole))) / _p95(rng.choice(small, len(small))) for _ in range(500)]
    low, high = np.quantile(resampled, (0.025, 0.975))
    value = _p95(whole) / _p95(small)
    return Figure("growth_1m_to_10m", value, float(low), float(high), len(whole), "ratio of p95, a tenth to all")


def _p95(values: Sequence[float] | np.ndarray) -> float:
    return float(np.quantile(values, 0.95))


def _tell(timings: Sequence[Timing], say: Say) -> None:
    """The slowest panels by name, so that somebody can do something about them."""
    worst: dict[tuple[str, str, bool], float] = {}
    for t in timings:
        worst[t.question] = max(worst.get(t.question, 0.0), t.ms)
    for (panel, window, filtered), ms in sorted(worst.items(), key=lambda item: -item[1])[:12]:
        say(f"  {ms:7.1f} ms  {panel} over {window}{', one class' if filtered else ''}")
