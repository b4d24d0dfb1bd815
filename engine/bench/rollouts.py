"""`slipstream bench rollouts`: whole rollouts in simulated worlds, decided by the real ``decide``.

Each world runs many rollouts of the ``standard`` preset, with a look at every few requests until it rolls back, is over
or runs out of requests. Beside it, on the same traffic, two rules that people write by hand: a threshold on windows,
and a significance test that is looked at all the time.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from engine.bench.report import Figure, Report, quantile_figure, share_figure
from engine.bench.rollout_naive import naive_peek, naive_window
from engine.bench.rollout_simulation import Simulation, no_traffic
from engine.bench.rollout_world import Regression, Traffic, World, looks

MARGIN = 1.05
EQUAL = [
    World("identical"),
    World("margin", Regression(scale=MARGIN)),
    World("load_shock", traffic=Traffic(shock=3.0)),
    World("diurnal", traffic=Traffic(day=0.5)),
    World("mix_shift", traffic=Traffic(mix=True)),
    World("slow_replica", traffic=Traffic(slow_replica=0.25)),
    World("bad_records", traffic=Traffic(lost=0.05, doubled=0.03, late=20)),
    World("one_big_key", traffic=Traffic(big_key=1_000)),
    World("rare_long_class", traffic=Traffic(long_share=0.05)),
    World("uneven_keys", traffic=Traffic(uneven=1.5)),
]
BY_STEPS = World("one_big_key_by_steps", traffic=Traffic(big_key=1_000, by_steps=True))
CONVERSATIONS = World("20_requests_per_key", traffic=Traffic(per_key=20))
BY_REQUEST = World("20_per_key_latency_by_request", traffic=Traffic(per_key=20, as_requests=True))
WORSE = [
    World("p50_x2", Regression(scale=2.0)),
    World("p95_x1.5", Regression(tail=1.5)),
    World("tail_x5_in_2pct", Regression(slow_share=0.02, timeouts=0.01)),
    World("acceptance_-.05", Regression(acceptance=-0.05)),
    World("errors_2pct", Regression(errors=0.02)),
    World("errors_5pct", Regression(errors=0.05)),
    World("hangs_5pct", Regression(timeouts=0.05)),
]
SEGMENT = World("one_class_of_10pct", Regression(acceptance=-0.10, only="batch"))
LATER = ("held", "soaking", "promoting", "watching")
"""Regressions that begin when a state is reached: the canary was better by five points of acceptance, and falls to ten
points below its control."""
OTHER_PRESETS = ("fast", "cautious")
"""Those that identical arms are tried under as well."""
NOT_REACHED = "not reached"
QUICK, FULL = (200, 20, 2, 10, 3, 2_000), (2_000, 1_000, 200, 200, 100, 3_000)
"""Rollouts with identical arms, at the margin, in every other world without a fault, in those with one, in those where
it comes later; requests per arm."""
LATER_LOOK = 20
"""Requests between two looks there at most: what is late in a rollout is looked at as often as what is early."""


@dataclass(frozen=True, slots=True)
class Run:
    """How one rollout ended: ``at`` requests per arm and ``seconds`` after its traffic (or its regression) began,
    ``segment`` and ``worst`` class named by the guard that failed; when the naive rules would have rolled back."""

    ended: str
    at: int
    seconds: float
    guard: str
    segment: str
    worst: str
    window: int | None
    peek: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Rollouts of one world, from one seed after the other, and the figures that they come to."""

    world: World
    count: int
    length: int
    figures: Callable[[list[Run], np.random.Generator], list[Figure]]
    until: str = ""
    preset: str = "standard"


def run(quick: bool, seed: int, progress: Callable[[str], None] = lambda _: None, workers: int | None = None) -> Report:
    """All worlds. ``quick``: 200 rollouts with identical arms and few elsewhere; otherwise 2,000."""
    figures: list[Figure] = []
    rng = np.random.default_rng(seed)
    batches = _batches(*(QUICK if quick else FULL))
    pool = ProcessPoolExecutor(workers or min(4, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn"))
    try:
        going = [  # all at once: no worker waits for the last rollout of a world
            pool.map(partial(rollout, b.world, b.length, b.until, preset=b.preset), range(seed, seed + b.count))
            for b in batches
        ]
        for b, ends in zip(batches, going, strict=True):
            progress(f"{b.world.name}, {b.preset}: {b.count} rollouts of {b.length} requests per arm")
            figures += b.figures(list(ends), rng)
    finally:
        pool.shutdown(cancel_futures=True)
    ended, after_hour = no_traffic()
    figures.append(share_figure("no_traffic:promoted_or_blamed_within_the_hour", int(after_hour), 1))
    figures.append(share_figure("no_traffic:inconclusive_at_its_deadline", int(ended == "INCONCLUSIVE"), 1))
    return Report("rollouts", seed, figures)


def _batches(many: int, margin: int, others: int, found: int, late: int, horizon: int) -> list[Batch]:
    counts = {"identical": many, "margin": margin}
    later = [(until, World(f"begins_{until}", Regression(acceptance=-0.10), before=0.05)) for until in LATER]
    return [
        *(Batch(w, counts.get(w.name, others), horizon, partial(_false_with_naive, w.name)) for w in EQUAL),
        *(Batch(EQUAL[0], others, horizon, partial(_false, name), preset=name) for name in OTHER_PRESETS),
        *(Batch(w, others, 2 * horizon, partial(_false, w.name)) for w in (BY_STEPS, CONVERSATIONS, BY_REQUEST)),
        *(Batch(w, found, horizon, partial(_detection, w.name)) for w in WORSE),
        Batch(SEGMENT, found, 6_000, _named),
        *(Batch(w, late, 6_000, partial(_later, w.name), until) for until, w in later),
    ]


def rollout(world: World, horizon: int, until: str, seed: int, preset: str = "standard") -> Run:
    """One rollout. With ``until`` the regression begins when that state is reached, and ``at`` counts from there."""
    at = looks(horizon, LATER_LOOK) if until else looks(horizon)
    begins = 0
    if until:
        reached = Simulation(replace(world, wrong=Regression(acceptance=world.before)), seed, at).reaches(until)
        if reached is None:  # by chance it leaned against a class to the end: nothing began, and nothing could be found
            return Run(NOT_REACHED, 0, 0.0, "", "", "", None, None)
        begins = int(at[reached])
    going = Simulation(world, seed, at, begins, preset=preset)
    ended, look, failed = going.end(hold=until == "held")
    window, peek = naive_window(going.arms), naive_peek(going.arms, at)
    named = (failed.guard, failed.segment, failed.worst) if failed is not None else ("", "", "")
    return Run(ended, max(0, int(at[look]) - begins), going.seconds_since(begins), *named, window, peek)


def _rolled_back(ends: Sequence[Run]) -> int:
    return sum(r.ended == "rolled_back" for r in ends)


def _false(name: str, ends: Sequence[Run], _: np.random.Generator) -> list[Figure]:
    return [share_figure(f"false_rollback:{name}", _rolled_back(ends), len(ends))]


def _false_with_naive(name: str, ends: Sequence[Run], rng: np.random.Generator) -> list[Figure]:
    figures = _false(name, ends, rng)
    for rule in ("window", "peek"):
        naive = f"naive_{rule}" if name == "identical" else f"naive_{rule}_{name}"
        fired = sum(getattr(r, rule) is not None for r in ends)
        figures.append(share_figure(f"false_rollback:{naive}", fired, len(ends)))
    return figures


def _detection(name: str, ends: Sequence[Run], rng: np.random.Generator) -> list[Figure]:
    """A rollout that is not rolled back counts as found after the last request of the longest."""
    rate = share_figure(f"detected:{name}", _rolled_back(ends), len(ends))
    figures = [rate]
    for label, unit, field in (("detect_n", "requests per arm", "at"), ("detect_s", "s", "seconds")):
        longest = max(getattr(r, field) for r in ends)
        at = [float(getattr(r, field) if r.ended == "rolled_back" else longest) for r in ends]
        figures += [
            quantile_figure(f"{label}{suffix}:{name}", at, q, unit, rng) for suffix, q in (("", 0.5), ("_p90", 0.9))
        ]
    for rule in ("window", "peek"):
        fired = sum(getattr(r, rule) is not None for r in ends)
        figures.append(share_figure(f"detected_naive_{rule}:{name}", fired, len(ends)))
    return figures


def _named(ends: Sequence[Run], rng: np.random.Generator) -> list[Figure]:
    named = sum(r.ended == "rolled_back" and SEGMENT.wrong.only in (r.segment, r.worst) for r in ends)
    return [*_detection(SEGMENT.name, ends, rng)[:4], share_figure("segment_named", named, len(ends))]


def _later(name: str, ends: Sequence[Run], rng: np.random.Generator) -> list[Figure]:
    return _detection(name, [r for r in ends if r.ended != NOT_REACHED], rng)[:5]
