"""Simulated traffic of a canary and its control, summed as the evidence query sums it, as fast as numpy goes.

A request of class c takes 10–59 verify steps with two drafted tokens each, its own acceptance around the level of its
class, a log-normal end-to-end latency (σ = 0.5) around the median of its class, and now and then an error, a timeout or
a retry. What happens to the traffic (shocks, days, mixes, slow replicas, lost records) happens to both arms; what
happens to the canary is a ``Regression``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engine.contracts import CANARY, CONTROL
from engine.store import histogram
from engine.store.repositories.evidence import Segment

CLASSES = ("chat", "code", "long_form", "batch")
SHARES = (0.4, 0.3, 0.2, 0.1)
LEVELS = (0.35, 0.5, 0.4, 0.45)
"""Acceptance of a drafted token, by class."""
MEDIANS = (1.0, 1.2, 1.4, 1.1)
"""End-to-end seconds, by class."""
SIGMA = 0.5
SMALLEST, BUCKETS = histogram.bucket(0.02), histogram.bucket(600.0) - histogram.bucket(0.02) + 1
COUNTED = ("n", "x", "y", "xx", "yy", "xy", "error_keys", "timeout_keys", "retry_keys")
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Regression:
    """What is wrong with the canary from its request ``begins`` on, in all classes or in ``only`` one.

    ``tail`` stretches log latencies above the median so that p95 grows by this factor while p50 stays.
    """

    acceptance: float = 0.0
    scale: float = 1.0
    tail: float = 1.0
    errors: float = 0.005
    timeouts: float = 0.001
    slow_share: float = 0.0
    only: str | None = None
    begins: int = 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """What happens to both arms alike. ``shock`` and ``day`` multiply latencies, ``mix`` moves the classes' shares,
    ``slow_replica`` is the share of requests on a replica half as fast; records can be lost, doubled or late."""

    shock: float = 1.0
    day: float = 0.0
    mix: bool = False
    slow_replica: float = 0.0
    lost: float = 0.0
    doubled: float = 0.0
    late: int = 0
    faults: Regression = field(default_factory=Regression)


class Arm:
    """One arm's requests and, at each look, their sums: [looks, classes, COUNTED] and [looks, classes, BUCKETS]."""

    def __init__(self, name: str, rng: np.random.Generator, looks: Array, traffic: Traffic, wrong: Regression) -> None:
        n = int(looks[-1])
        place = np.arange(n) / n
        self.name = name
        self.of_class = _classes(rng, place, traffic.mix)
        hit = np.arange(n) >= wrong.begins
        if wrong.only is not None:
            hit &= self.of_class == CLASSES.index(wrong.only)
        self.steps = rng.integers(10, 60, n)
        own = rng.beta(6, 6, n) - 0.5 + np.take(LEVELS, self.of_class) + wrong.acceptance * hit
        self.accepted = rng.binomial(2 * self.steps, np.clip(own, 0.0, 1.0))
        self.latency = np.take(MEDIANS, self.of_class) * _latencies(rng, n, wrong, hit) * _load(rng, place, traffic)
        usual = traffic.faults
        self.failed = rng.random(n) < np.where(hit, wrong.errors, usual.errors)
        self.late = rng.random(n) < np.where(hit, wrong.timeouts, usual.timeouts)
        again = (self.failed | self.late) & (rng.random(n) < 0.5)
        times = (rng.random(n) >= traffic.lost) * (1.0 + (rng.random(n) < traffic.doubled))
        self.sums, self.counts = self._summed(looks, traffic.late, times, again)

    def _summed(self, looks: Array, late: int, times: Array, again: Array) -> tuple[Array, Array]:
        n, classes = len(self.steps), len(CLASSES)
        seen = np.minimum(np.searchsorted(looks, np.arange(1, n + 1) + late), len(looks))  # first look that has it
        row = seen * classes + self.of_class
        x, y = (self.steps + self.accepted).astype(float), self.steps.astype(float)
        each = (1.0, x, y, x * x, y * y, x * y, self.failed, self.late, again)
        rows = (len(looks) + 1) * classes
        sums = np.stack([np.bincount(row, times * value, rows) for value in each], axis=1)
        fine = ~(self.failed | self.late)
        where = np.ceil(np.log(self.latency) / histogram.LOG_GAMMA).astype(int) - SMALLEST
        cell = row[fine] * BUCKETS + np.clip(where[fine], 0, BUCKETS - 1)
        counts = np.bincount(cell, times[fine], rows * BUCKETS)
        shape = (len(looks) + 1, classes, -1)
        return sums.reshape(shape).cumsum(0)[:-1], counts.reshape(shape).cumsum(0)[:-1]

    def segments(self, look: int, stage_look: int | None) -> list[Segment]:
        """All classes together, then each; ``stage_look``: the look before the present stage began."""
        sums, counts = self.sums[look], self.counts[look]
        before = self.sums[stage_look] if stage_look is not None else np.zeros_like(sums)
        whole = self._segment(None, sums.sum(0), counts.sum(0), before.sum(0))
        return [whole, *(self._segment(c, sums[k], counts[k], before[k]) for k, c in enumerate(CLASSES))]

    def _segment(self, name: str | None, sums: Array, counts: Array, before: Array) -> Segment:
        found = dict(zip(COUNTED, sums.tolist(), strict=True))
        whole = {key: int(found.pop(key)) for key in ("n", "error_keys", "timeout_keys", "retry_keys")}
        filled = np.flatnonzero(counts)
        latencies: Any = {"e2e": (filled + SMALLEST, counts[filled])}
        n = whole["n"]
        stage = n - int(before[0])
        return Segment(self.name, name, requests=n, stage_requests=stage, keys=n, **whole, **found, latencies=latencies)


@dataclass(frozen=True, slots=True)
class World:
    """A name, what happens to the traffic, and what is wrong with the canary."""

    name: str
    wrong: Regression = field(default_factory=Regression)
    traffic: Traffic = field(default_factory=Traffic)

    def arms(self, seed: int, looks: Array, begins: int = 0) -> tuple[Arm, Arm]:
        rng = np.random.default_rng(seed)
        wrong = replace(self.wrong, begins=begins) if begins else self.wrong
        return Arm(CANARY, rng, looks, self.traffic, wrong), Arm(CONTROL, rng, looks, self.traffic, self.traffic.faults)


def looks(horizon: int, growth: float = 1.05) -> Array:
    """Requests per arm at each look: every fifth at first, then about every twentieth part more."""
    found = [10]
    while found[-1] < horizon:
        found.append(min(horizon, max(found[-1] + 5, int(found[-1] * growth))))
    return np.array(found)


def _classes(rng: np.random.Generator, place: Array, moving: bool) -> Array:
    """Classes of requests; with ``moving`` the first class hands its share to the second along the way."""
    draw, edges = rng.random(len(place)), np.cumsum(SHARES)
    first = edges[0] * (1.0 - 0.8 * place) if moving else np.full(len(place), edges[0])
    found = np.searchsorted(edges[1:], draw, side="right") + 1
    return np.minimum(np.where(draw < first, 0, np.maximum(found, 1)), len(CLASSES) - 1)


def _latencies(rng: np.random.Generator, n: int, wrong: Regression, hit: Array) -> Array:
    z = SIGMA * rng.standard_normal(n)
    stretch = 1.0 + np.log(wrong.tail) / (1.6449 * SIGMA)
    slow = np.where(rng.random(n) < wrong.slow_share, 5.0, 1.0)
    return np.where(hit, np.exp(np.where(z > 0, z * stretch, z)) * wrong.scale * slow, np.exp(z))


def _load(rng: np.random.Generator, place: Array, traffic: Traffic) -> Array:
    """Latency factor of the moment (the same for both arms) and of the replica that a request fell on."""
    shock = np.where((place > 0.3) & (place < 0.5), traffic.shock, 1.0)
    replica = np.where(rng.random(len(place)) < traffic.slow_replica, 2.0, 1.0)
    return shock * replica * np.exp(traffic.day * np.sin(4 * np.pi * place))
