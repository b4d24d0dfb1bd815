"""What one look at a rollout costs after so many compared requests: the next ones counted, and the sums read."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import numpy as np

from engine.bench.report import Figure, Report, quantile_figure
from engine.bench.seeded import scratch
from engine.ops.supervisor import Say
from engine.store.database import Database
from engine.store.repositories import compared, evidence, seeding
from engine.store.repositories.compared import Window

GENERATION = 7
LOOKS, FRESH = 20, 500
"""Looks that are measured, and the requests that came since the one before, as at 500 compared requests a second."""


def run(requests: int, seed: int, say: Say) -> Report:
    """A look at a tenth of the compared requests and at all of them, in one run, and how fast a backlog is counted."""
    rng, now = np.random.default_rng(seed), datetime.now(UTC)
    day = (now - timedelta(days=1)).date()
    window = Window(GENERATION, *(datetime(day.year, day.month, day.day, tzinfo=UTC),) * 2)
    with scratch(say) as database:
        began = time.monotonic()
        with database.write() as session:
            seeding.add_compared(session, day, GENERATION, requests, seed % 1000 / 1000)
        with database.write() as session:
            seeding.analyze(session)
        say(f"seeded {requests:,} compared requests in {time.monotonic() - began:.0f} s")
        counted, rates, figures = 0, list[float](), list[Figure]()
        for share in (0.1, 1.0):
            until = round(share * requests) - LOOKS * FRESH
            while counted < until:
                some = min(compared.LIMIT, until - counted)
                rates.append(some / _count(database, window, now, some))
                counted += some
            looks = []
            for _ in range(LOOKS):
                took = _count(database, window, now, FRESH)
                counted += FRESH
                looks.append(1e3 * (took + _read(database, window)))
            figures.append(quantile_figure(f"look_ms:{counted}", looks, 0.5, "ms", rng))
            say(f"{counted:,} counted: median look {figures[-1].value:.0f} ms")
        figures.append(quantile_figure("backlog_per_s", rates, 0.5, "requests/s", rng))
    return Report("evidence", seed, figures)


def _count(database: Database, window: Window, now: datetime, limit: int) -> float:
    began = time.perf_counter()
    with database.write() as session:
        compared.take_in(session, [window], now, limit)
    return time.perf_counter() - began


def _read(database: Database, window: Window) -> float:
    began = time.perf_counter()
    with database.read() as session:
        evidence.segments(session, [window])
        evidence.newest(session, window)
    return time.perf_counter() - began
