"""What the trace store costs at scale: every panel query of every page, ingest, visibility, and the rollups' error.

Traces are made up set-based over thirty days, in two steps of a tenth and of all, so that growth is measured in one
run. Everything happens in a database of its own, which is thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import numpy as np

from engine.bench import ingest
from engine.bench.report import Figure, Report, quantile_figure
from engine.bench.rig import own_home
from engine.ops import postgres, upkeep
from engine.ops.supervisor import Say
from engine.settings import Settings, TelemetrySettings
from engine.store import migrate
from engine.store.database import Database
from engine.store.panels import PANELS
from engine.store.repositories import audit, overview, partitions, seeding
from engine.store.repositories.overview import Slice

DAYS = 30
REPEATS = 3
WINDOWS = {"1h": timedelta(hours=1), "24h": timedelta(hours=24), "7d": timedelta(days=7), "30d": timedelta(days=30)}
QS = (0.5, 0.9, 0.95, 0.99, 0.999)
DURATIONS = ("ttft", "tpot", "e2e", "queue")


@dataclass(frozen=True, slots=True)
class Timing:
    """One run of one panel's query."""

    panel: str
    window: str
    filtered: bool
    ms: float


def run(settings: Settings, traces: int, ingest_rate: int, ingest_s: float, seed: int, say: Say) -> Report:
    rng = np.random.default_rng(seed)
    with throwaway_database(say) as database:
        end = datetime.now(UTC)
        small = max(traces // 10, 1)
        _seed(database, settings.telemetry, small, end, seed, say)
        before = time_panels(database, end)
        _seed(database, settings.telemetry, traces - small, end, seed + 1, say)
        after = time_panels(database, end)
        _tell(after, say)
        say(f"p95 over all panels: {_p95(before):.1f} ms with {small:,} traces, {_p95(after):.1f} ms with {traces:,}")
        with database.read() as session:
            size, total = sum(size for _, _, size in partitions.existing(session)), audit.traces(session)
        say(f"{total:,} traces, {size / 1e9:.2f} GB of partitions")
        month = Slice(end - timedelta(days=DAYS), end)
        raw = [_raw_ms(database, month) for _ in range(REPEATS)]
        error, values = _relative_error(database, month)
        growth = _p95(after) / _p95(before)
        figures = [
            quantile_figure("panel_ms_p95", [t.ms for t in after], 0.95, "ms", rng),
            quantile_figure("panel_ms_p50", [t.ms for t in after], 0.5, "ms", rng),
            quantile_figure("raw_ms", raw, 0.5, "ms", rng),
            _growth(before, after, growth, rng),
            Figure("rollup_relative_error_max", error, error, error, values, "of the value"),
            Figure("stored_traces", total, total, total, total, "traces"),
            Figure("stored_bytes", size, size, size, total, "bytes"),
        ]
        say(Report("store", seed, figures).to_text())
        say(f"ingest: {ingest_rate:,} traces/s for {ingest_s:.0f} s")
        return Report("store", seed, [*figures, *ingest.measure(database, ingest_rate, ingest_s, rng, say)])


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
                        panel.read(session, part)
                        took = (time.perf_counter() - began) * 1e3
                    if attempt:
                        found.append(Timing(name, window, traffic_class is not None, took))
    return found


def _seed(database: Database, telemetry: TelemetrySettings, traces: int, end: datetime, seed: int, say: Say) -> None:
    began = time.monotonic()
    first = (end - timedelta(days=DAYS)).date()
    with ThreadPoolExecutor(1) as beside, ExitStack() as ending:
        ending.callback(beside.shutdown, wait=False, cancel_futures=True)  # an interrupted run makes no more of them
        rolled_up = []
        for number in range(DAYS + 1):
            day = first + timedelta(days=number)
            with database.write() as session:
                seeding.add_day(session, day, number, -(-traces // DAYS), end, (seed * 31 + number) % 1000 / 1000)
            rolled_up.append(beside.submit(upkeep.rebuild, database, telemetry, day, day, lambda line: None))
        seeded = time.monotonic() - began
        for made in rolled_up:
            made.result()
    with database.write() as session:
        seeding.analyze(session)
    say(f"seeded {traces:,} traces in {seeded:.0f} s, rolled up {time.monotonic() - began - seeded:.0f} s later")


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


def _growth(before: Sequence[Timing], after: Sequence[Timing], growth: float, rng: np.random.Generator) -> Figure:
    """The ratio of the two p95, with its bootstrap interval."""
    resampled = [
        _quantile(rng.choice([t.ms for t in after], len(after)))
        / _quantile(rng.choice([t.ms for t in before], len(before)))
        for _ in range(500)
    ]
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Figure("growth_1m_to_10m", growth, float(low), float(high), len(after), "ratio of p95, a tenth to all")


def _p95(timings: Sequence[Timing]) -> float:
    return _quantile([t.ms for t in timings])


def _quantile(values: Sequence[float] | np.ndarray) -> float:
    return float(np.quantile(values, 0.95))


def _tell(timings: Sequence[Timing], say: Say) -> None:
    """The slowest panels by name, so that somebody can do something about them."""
    worst: dict[tuple[str, str, bool], float] = {}
    for t in timings:
        key = t.panel, t.window, t.filtered
        worst[key] = max(worst.get(key, 0.0), t.ms)
    for (panel, window, filtered), ms in sorted(worst.items(), key=lambda item: -item[1])[:12]:
        say(f"  {ms:7.1f} ms  {panel} over {window}{', one class' if filtered else ''}")


@contextmanager
def throwaway_database(say: Say) -> Iterator[Database]:
    """A migrated database of its own in a server of its own; both are gone afterwards."""
    with own_home() as home:
        say("starting Postgres")
        url = postgres.start(home)
        migrate.upgrade(url)
        database = Database(url, application="slipstream bench", statement_timeout_s=1_800)
        yield database
        database.close()
