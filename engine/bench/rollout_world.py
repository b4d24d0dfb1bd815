"""Simulated traffic of a canary and its control, summed as the evidence query sums it, as fast as numpy goes.

A key brings one request, or ``per_key`` of them in one class. A request of class c takes 10–59 verify steps with two
drafted tokens each, its own acceptance around the level of its class, a log-normal end-to-end latency (σ = 0.5)
around the median of its class, and now and then an error, a timeout or a retry. Other latencies and the cost of a
token are the end-to-end latency but for a noise of their own: what compares them knows no units. What happens to the
traffic (shocks, days, mixes, slow replicas, lost records) happens to both arms; what happens to the canary is a
``Regression``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engine.contracts import CANARY, CONTROL
from engine.store import histogram
from engine.store.segments import Segment

CLASSES = ("chat", "code", "long_form", "batch")
SHARES = (0.4, 0.3, 0.2, 0.1)
LEVELS = (0.35, 0.5, 0.4, 0.45)
"""Acceptance of a drafted token, by class."""
MEDIANS = (1.0, 1.2, 1.4, 1.1)
"""End-to-end seconds, by class."""
SIGMA = 0.5
OWN_SIGMA = 0.3
"""Deviation of what the logarithm of another metric has for itself."""
SMALLEST, BUCKETS = histogram.bucket(0.02), histogram.bucket(600.0) - histogram.bucket(0.02) + 1
COUNTED = ("requests", "n", "x", "y", "xx", "yy", "xy", "error_keys", "timeout_keys", "retry_keys")
LONG = 30.0
OPEN = 10
"""Conversations that go on at a time, where keys bring many requests."""
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
    ``slow_replica`` is the share of requests on a replica half as fast; records can be lost, doubled or late. With
    ``per_key`` requests a key, most of what makes requests differ is the key's. One of an arm's first dozen keys
    takes ``big_key`` times the usual steps; ``uneven`` is the deviation of the logarithm of a key's steps.
    ``long_share`` of the requests take LONG times as long, so that a gap opens between what is usual and what is not.

    Two rules that are wrong, to compare with: ``as_requests`` counts latencies as if each request had a key of its own,
    ``by_steps`` weighs a key's tokens per step by its steps."""

    shock: float = 1.0
    day: float = 0.0
    mix: bool = False
    slow_replica: float = 0.0
    lost: float = 0.0
    doubled: float = 0.0
    late: int = 0
    per_key: int = 1
    big_key: int = 1
    uneven: float = 0.0
    long_share: float = 0.0
    as_requests: bool = False
    by_steps: bool = False
    faults: Regression = field(default_factory=Regression)


class Arm:
    """One arm's requests and their sums at each look: [looks, classes, COUNTED] and [looks, classes, metrics, BUCKETS].

    ``before`` is what was different about the canary until ``wrong`` began, for example that it was better.
    """

    def __init__(
        self,
        name: str,
        rng: np.random.Generator,
        looks: Array,
        traffic: Traffic,
        wrong: Regression,
        before: float = 0.0,
        metrics: Sequence[str] = ("e2e",),
    ) -> None:
        n = int(looks[-1])
        place = np.arange(n) / n
        self.name, self.metrics = name, tuple(metrics)
        self.of_class = _classes(rng, place, traffic.mix)
        keys, self.key = n, np.arange(n)
        if traffic.per_key > 1:  # some conversations at a time, each in one class
            keys = -(-n // traffic.per_key) + OPEN
            self.key = np.arange(n) // traffic.per_key + rng.integers(0, OPEN, n)
            self.of_class = rng.choice(len(CLASSES), keys, p=SHARES)[self.key]
        hit = np.arange(n) >= wrong.begins
        if wrong.only is not None:
            hit &= self.of_class == CLASSES.index(wrong.only)
        self.steps, self.by_steps = _steps(rng, n, traffic), traffic.by_steps
        own = rng.beta(6, 6, keys)[self.key] - 0.5 + np.take(LEVELS, self.of_class)
        own += np.where(hit, wrong.acceptance, before)
        self.accepted = rng.binomial(2 * self.steps, np.clip(own, 0.0, 1.0))
        alike = rng.standard_normal(keys)[self.key] if traffic.per_key > 1 else None
        own_time = _latencies(rng, n, wrong, hit, alike)
        self.latency = np.take(MEDIANS, self.of_class) * own_time * _load(rng, place, traffic)
        apart = rng.spawn(1)[0]  # what is drawn otherwise does not depend on the metrics
        self.seconds = {
            metric: self.latency * (1.0 if metric == "e2e" else np.exp(OWN_SIGMA * apart.standard_normal(n)))
            for metric in self.metrics
        }
        usual = traffic.faults
        self.failed = rng.random(n) < np.where(hit, wrong.errors, usual.errors)
        self.late = rng.random(n) < np.where(hit, wrong.timeouts, usual.timeouts)
        again = (self.failed | self.late) & (rng.random(n) < 0.5)
        times = (rng.random(n) >= traffic.lost) * (1.0 + (rng.random(n) < traffic.doubled))
        if traffic.per_key > 1:
            self.sums, self.counts = self._summed_by_key(looks, again, traffic.as_requests)
        else:
            self.sums, self.counts = self._summed(looks, traffic.late, times, again)

    def _summed(self, looks: Array, late: int, times: Array, again: Array) -> tuple[Array, Array]:
        n, classes = len(self.steps), len(CLASSES)
        seen = np.minimum(np.searchsorted(looks, np.arange(1, n + 1) + late), len(looks))  # first look that has it
        row = seen * classes + self.of_class
        x, y = self._weighed(self.steps + self.accepted, self.steps)
        each = (1.0, 1.0, x, y, x * x, y * y, x * y, self.failed, self.late, again)
        rows = (len(looks) + 1) * classes
        sums = np.stack([np.bincount(row, times * value, rows) for value in each], axis=1)
        fine, metrics = ~(self.failed | self.late), len(self.metrics)
        cells = [(row * metrics + m) * BUCKETS + bucket for m, bucket in enumerate(self._buckets())]
        counts = np.bincount(
            np.concatenate([cell[fine] for cell in cells]), np.tile(times[fine], metrics), rows * metrics * BUCKETS
        ).reshape(len(looks) + 1, classes, metrics, BUCKETS)
        counts.cumsum(0, out=counts)  # in place: they are megabytes
        return sums.reshape(len(looks) + 1, classes, -1).cumsum(0)[:-1], counts[:-1]

    def _summed_by_key(self, looks: Array, again: Array, as_requests: bool) -> tuple[Array, Array]:
        """The same where a key has many requests: what is squared is the sum of a key, which grows with every look."""
        classes, size = len(CLASSES), int(self.key.max()) + 1
        tokens = self.steps + self.accepted
        of_key = np.zeros(size, int)
        of_key[self.key] = self.of_class
        buckets, fine = self._buckets(), ~(self.failed | self.late)
        sums = np.zeros((len(looks), classes, len(COUNTED)))
        counts = np.zeros((len(looks), classes, len(buckets), BUCKETS))
        for at, n in enumerate(looks.tolist()):
            key = self.key[:n]
            met = [np.bincount(key, event[:n], size) > 0 for event in (self.failed, self.late, again)]
            kx, ky, brought = (np.bincount(key, value, size) for value in (tokens[:n], self.steps[:n], np.ones(n)))
            kx, ky = self._weighed(kx, ky)
            each = (brought, brought > 0, kx, ky, kx * kx, ky * ky, kx * ky, *met)
            sums[at] = np.stack([np.bincount(of_key, value, classes) for value in each], axis=1)
            ended = np.flatnonzero(fine[:n])
            times = np.bincount(self.key[ended], None, size)[self.key[ended]]
            share = np.ones(len(ended)) if as_requests else 1.0 / times
            for metric, bucket in enumerate(buckets):
                cell = self.of_class[ended] * BUCKETS + bucket[ended]
                counts[at, :, metric] = np.bincount(cell, share, classes * BUCKETS).reshape(classes, BUCKETS)
        return sums, counts

    def _weighed(self, tokens: Array, steps: Array) -> tuple[Array, Array]:
        """x and y of keys, as ``store.segments`` has them: tokens per step, and 1."""
        x, y = np.asarray(tokens, float), np.asarray(steps, float)
        return (x, y) if self.by_steps else (np.divide(x, y, out=np.zeros_like(x), where=y > 0), (y > 0).astype(float))

    def _buckets(self) -> list[Array]:
        where = [np.ceil(np.log(seconds) / histogram.LOG_GAMMA).astype(int) for seconds in self.seconds.values()]
        return [np.clip(at - SMALLEST, 0, BUCKETS - 1) for at in where]

    def segments(self, look: int, stage_look: int | None, watch_look: int | None = None) -> list[Segment]:
        """All classes together, then each; ``stage_look``: the look before the present stage began. With a
        ``watch_look``, only what came after that look.
        """
        sums, counts = self.sums[look], self.counts[look]
        before = self.sums[stage_look, :, 0] if stage_look is not None else np.zeros(len(CLASSES))
        if watch_look is not None:
            sums, counts, before = sums - self.sums[watch_look], counts - self.counts[watch_look], 0.0 * before
        whole = self._segment(None, sums.sum(0), counts.sum(0), before.sum())
        return [whole, *(self._segment(c, sums[k], counts[k], before[k]) for k, c in enumerate(CLASSES))]

    def _segment(self, name: str | None, sums: Array, counts: Array, before: float) -> Segment:
        requests, n, x, y, xx, yy, xy, errors, timeouts, retries = sums.tolist()  # as COUNTED has them
        latencies: Any = {}
        for metric, counted in zip(self.metrics, counts, strict=True):
            filled = counted.nonzero()[0]
            latencies[metric] = (filled + SMALLEST, counted[filled])
        return Segment(
            self.name,
            name,
            requests=int(requests),
            stage_requests=int(requests - before),
            keys=int(n),
            error_keys=int(errors),
            timeout_keys=int(timeouts),
            retry_keys=int(retries),
            n=int(n),
            x=x,
            y=y,
            xx=xx,
            yy=yy,
            xy=xy,
            latencies=latencies,
        )


@dataclass(frozen=True, slots=True)
class World:
    """A name, what happens to the traffic, and what is wrong with the canary; ``before`` that began its acceptance is
    higher by so much."""

    name: str
    wrong: Regression = field(default_factory=Regression)
    traffic: Traffic = field(default_factory=Traffic)
    before: float = 0.0

    def arms(
        self, seed: int | Sequence[int], looks: Array, begins: int = 0, metrics: Sequence[str] = ("e2e",)
    ) -> tuple[Arm, Arm]:
        rng = np.random.default_rng(seed)
        wrong = replace(self.wrong, begins=begins) if begins else self.wrong
        canary = Arm(CANARY, rng, looks, self.traffic, wrong, self.before, metrics)
        return canary, Arm(CONTROL, rng, looks, self.traffic, self.traffic.faults, metrics=metrics)


def looks(horizon: int, most: int = 10**9, growth: float = 1.05) -> Array:
    """Requests per arm at each look: every fifth at first, then about a twentieth more, at ``most`` so many."""
    found = [10]
    while found[-1] < horizon:
        found.append(min(horizon, found[-1] + min(most, max(5, int(found[-1] * (growth - 1.0))))))
    return np.array(found)


def _classes(rng: np.random.Generator, place: Array, moving: bool) -> Array:
    """Classes of requests; with ``moving`` the first class hands its share to the second along the way."""
    draw, edges = rng.random(len(place)), np.cumsum(SHARES)
    first = edges[0] * (1.0 - 0.8 * place) if moving else np.full(len(place), edges[0])
    found = np.searchsorted(edges[1:], draw, side="right") + 1
    return np.minimum(np.where(draw < first, 0, np.maximum(found, 1)), len(CLASSES) - 1)


def _steps(rng: np.random.Generator, n: int, traffic: Traffic) -> Array:
    """Verify steps of each request: 10 to 59, or log-normal with the same median; one of the first dozen may tower."""
    if traffic.uneven:
        steps = np.maximum(2, np.rint(np.exp(rng.normal(np.log(34.5), traffic.uneven, n)))).astype(int)
    else:
        steps = rng.integers(10, 60, n)
    if traffic.big_key > 1:
        steps[rng.integers(0, 12)] *= traffic.big_key
    return steps


def _latencies(rng: np.random.Generator, n: int, wrong: Regression, hit: Array, alike: Array | None) -> Array:
    z = SIGMA * (rng.standard_normal(n) if alike is None else 0.8 * alike + 0.6 * rng.standard_normal(n))
    stretch = 1.0 + np.log(wrong.tail) / (1.6449 * SIGMA)
    slow = np.where(rng.random(n) < wrong.slow_share, 5.0, 1.0)
    return np.where(hit, np.exp(np.where(z > 0, z * stretch, z)) * wrong.scale * slow, np.exp(z))


def _load(rng: np.random.Generator, place: Array, traffic: Traffic) -> Array:
    """Latency factor of the moment (the same for both arms) and of the replica that a request fell on."""
    shock = np.where((place > 0.3) & (place < 0.5), traffic.shock, 1.0)
    replica = np.where(rng.random(len(place)) < traffic.slow_replica, 2.0, 1.0)
    rare = np.where(rng.random(len(place)) < traffic.long_share, LONG, 1.0) if traffic.long_share else 1.0
    return shock * replica * rare * np.exp(traffic.day * np.sin(4 * np.pi * place))
