"""What the dashboard costs at scale: processor time of a page, how soon it is there, and what open pages cost serving.

The database is full of made-up traces and rollouts (those of `bench store`, whose folder can be used); the engine, the
dashboard and Chromium are the real ones.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from engine.bench import paired, seeded, seeded_plan
from engine.bench.browser import chromium, start_dashboard
from engine.bench.pages import PAGES, QUIET_S, cpu_s, figures, look
from engine.bench.report import Figure, Report
from engine.bench.rig import Rig, rig, wait_until
from engine.bench.viewers import PATIENCE_S, READ, Recording, Viewers, record
from engine.demo import prompts
from engine.demo.traffic import served_model
from engine.ops.supervisor import Say
from engine.registry.artifacts import ArtifactStore
from engine.settings import Settings
from engine.store.database import Database
from engine.store.repositories import seeding

STILL = "explain"
"""It compares two windows of the past and is not drawn again by itself."""
OPEN_PAGES = 20
CLIENTS, REQUESTS, TOKENS = 2, 24, 24
"""Requests at a time, and that are sent again and again in a block; output tokens of each at most."""
PERIODS = 3
"""Refreshes of every open page that a block lasts for, at least: requests meet some of them and miss others."""
BARS = f"Bars: page_warm_cpu_ms_max 150, first_paint_s_p95 3, ratio:p95:{OPEN_PAGES}_pages/none 1.05; each at most."


@dataclass(frozen=True, slots=True)
class Options:
    """``reruns`` of each page and window (0: pages are not measured), ``pairs`` of serving blocks with open pages and
    without (0: none). ``keep`` is a folder whose database stays, and is used again."""

    traces: int = 200_000
    reruns: int = 5
    pairs: int = 8
    keep: Path | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Watched:
    """One block with open pages: how often they were drawn again, how often that was due, and the dashboard's seconds
    of processor in so many seconds."""

    refreshed: int
    due: float
    cpu_s: float
    seconds: float


def run(settings: Settings, options: Options, say: Say) -> Report:
    rng = np.random.default_rng(options.seed)
    with chromium("Pages"):
        pass  # that it is there is known before the database is filled
    with rig(settings, say, keep=options.keep) as system:
        _fill(system, options, say)
        address = start_dashboard(system)
        found = list[Figure]()
        if options.reruns:
            server = psutil.Process(system.supervisor.pid("dashboard"))
            with chromium("Pages") as browser:
                found += figures(look(browser, address, server, options.reruns, say), rng)
            say(Report("dashboard", options.seed, found).to_text())
        if options.pairs:
            with chromium("Pages") as browser:
                refresh_s = system.settings.dashboard.refresh_s
                live = [record(browser, address, f"/{path}", refresh_s) for path in PAGES if path != STILL]
            say("measuring what open pages cost serving")  # Chromium has ended
            found += _serving(system, address, live, options, rng, say)
    return Report("dashboard", options.seed, found, [BARS])


def _fill(system: Rig, options: Options, say: Say) -> None:
    patient = Database(
        system.settings.database_url or "", application="slipstream bench", statement_timeout_s=seeded.PATIENCE_S
    )
    store = ArtifactStore(system.settings.dir("policies"))
    try:
        seeded_plan.add_versions(patient, store, seeding.NEWEST)
        seeded.top_up(patient, system.settings.telemetry, options.traces, datetime.now(UTC), options.seed, say)
        plan = seeded_plan.serve_as_tried(patient, store)
    finally:
        patient.close()
    if plan is None:
        say("what is served is not what the seeded rollout tries: its versions have no files that an engine could load")
        return
    system.followed(plan, PATIENCE_S)


def _serving(
    system: Rig, address: str, live: Sequence[Recording], options: Options, rng: np.random.Generator, say: Say
) -> list[Figure]:
    """Latencies with open pages and without, in pairs of blocks. The pages are open all the time; in the blocks
    without they stand still, as paused ones do."""
    order = random.Random(options.seed)
    shipped = [prompt for found in prompts.shipped().values() for prompt in found]
    sent = order.sample(shipped, min(REQUESTS, len(shipped)))
    model, refresh_s = served_model(system.url), system.settings.dashboard.refresh_s
    viewers = Viewers(address, [live[n % len(live)] for n in range(OPEN_PAGES)], refresh_s)
    server = psutil.Process(system.supervisor.pid("dashboard"))
    pairs, blocks = list[tuple[list[float], list[float]]](), list[Watched]()
    viewers.start()
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            paired.serve(pool, system.url, model, sent, TOKENS)  # warms up; meanwhile the pages open
            began = time.perf_counter()
            paired.serve(pool, system.url, model, sent, TOKENS)
            times = math.ceil(PERIODS * refresh_s / (time.perf_counter() - began))
            viewers.wait_open()
            wait_until(partial(_rests, server), "the open pages to be drawn", PATIENCE_S)
            for number in range(1, options.pairs + 1):
                found = {}
                for watched in order.sample((True, False), 2):
                    used, began, seen = cpu_s(server), time.perf_counter(), viewers.refreshed
                    if watched:
                        viewers.active.set()
                    time.sleep(refresh_s)  # until every page has begun, or the last refresh has ended
                    found[watched] = paired.serve(pool, system.url, model, times * sent, TOKENS)
                    viewers.active.clear()
                    if watched:
                        took = time.perf_counter() - began
                        due = (took - READ * refresh_s) * OPEN_PAGES / refresh_s
                        blocks.append(Watched(viewers.refreshed - seen, due, cpu_s(server) - used, took))
                        time.sleep(refresh_s)  # what is under way is not the next block's
                viewers.check()
                pairs.append((found[True], found[False]))
                p95 = {watched: np.quantile(latencies, 0.95) for watched, latencies in found.items()}
                say(f"  {number}/{options.pairs}: p95 {p95[True]:.3f} s with open pages, {p95[False]:.3f} s without")
    finally:
        viewers.stop()
    return [*paired.ratios(f"{OPEN_PAGES}_pages/none", pairs, (0.95, 0.5), rng), *watched_figures(blocks, rng)]


def _rests(server: psutil.Process) -> bool:
    used = cpu_s(server)
    time.sleep(QUIET_S)
    return cpu_s(server) == used


def watched_figures(blocks: Sequence[Watched], rng: np.random.Generator) -> list[Figure]:
    """Whether the pages were drawn as often as they should, and what that took; intervals resample blocks."""
    return [
        paired.share("open_pages_refreshed", [(b.refreshed, b.due) for b in blocks], "of what is due", rng),
        paired.share("open_pages_cpu", [(b.cpu_s, b.seconds) for b in blocks], "cores", rng),
    ]
