"""What the compared requests of an arm come to, in each traffic class and in all: sums that grow request by request.

The assignment key was randomised, so the key is what is counted, and each weighs one: its tokens per verify step are
one observation however many steps it took, a key that met ten errors met one event, and in a latency histogram each of
its m requests weighs 1/m. A request that comes to a key therefore changes what the key counted before: its old share is
taken out, its new one put in. Pure.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from engine.store import histogram

METRICS = ("e2e", "ttft", "tpot", "cost")
"""Latencies, and ``cost``: what a token committed by verify steps took of the engine, seconds. A request is charged for
its own drafting and for its share of the passes, so requests of one batch, which all wait for the slowest draft in it,
differ here where their latencies do not."""
CLASSES, OTHER = 32, "other"
"""So many traffic classes of a comparison are told apart, the first that came; the rest are one. Clients name classes:
with one for every user a decision would hold thousands, and a class of its own evidence would weigh nothing."""
Counts = tuple[Sequence[int], Sequence[float]]
"""A sparse log histogram: (bucket indices ascending, keys)."""
Bucket = tuple[int, int]
"""(place of the metric in METRICS, bucket of the log histogram)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The requests of one arm in one traffic class, or in all classes together (``traffic_class`` None).

    ``keys`` and ``…_keys`` count assignment keys, not requests: a client that retries one failing request ten times is
    one event; ``error_keys`` met an error of their request or, those of ``draft_error_keys``, of its draft, without
    which the engine went on. ``n`` are the keys that took a verify step, and Σ is over them: x_k = tokens that key k
    committed per verify step, bonus included, over all of its requests in this class, and y_k = 1. Were y_k its steps,
    one key with most of the steps would be most of the mean and leave next to nothing of its variance. So counted
    decisions that were made before; the ratio of sums, Σx / Σy, judges both.
    ``latencies`` holds, per metric, the log histogram of requests that ended well, in which a key weighs one in all.
    ``stage_requests`` are those of the newest stage; ``audited`` and ``mismatches`` count outputs that were replayed
    without a draft, and those that differed.
    """

    arm: str
    traffic_class: str | None
    requests: int = 0
    stage_requests: int = 0
    keys: int = 0
    error_keys: int = 0
    timeout_keys: int = 0
    retry_keys: int = 0
    cancelled: int = 0
    n: int = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    audited: int = 0
    mismatches: int = 0
    draft_error_keys: int = 0
    latencies: dict[str, Counts] = field(default_factory=dict)

    def quantile(self, metric: str, q: float) -> float | None:
        """Seconds; None of nothing."""
        indices, counts = self.latencies.get(metric, ((), ()))
        if not len(indices):
            return None
        cumulated = np.cumsum(counts)
        rank = math.floor(q * (int(cumulated[-1]) - 1))
        return histogram.value(int(indices[int(np.searchsorted(cumulated, rank, side="right"))]))


@dataclass(frozen=True, slots=True)
class Request:
    """What guards look at in one request. ``seconds`` are its latencies in the order of METRICS, None where unknown."""

    arm: str
    key: Hashable
    generation: int
    traffic_class: str
    status: str
    retry: int
    steps: int
    accepted: int
    seconds: tuple[float | None, ...]
    draft_errors: int = 0


@dataclass(slots=True)
class KeySums:
    """What the requests of one key in one class came to: counts of requests, and their latencies by bucket."""

    requests: int = 0
    cancelled: int = 0
    errors: int = 0
    draft_errors: int = 0
    timeouts: int = 0
    retries: int = 0
    x: int = 0
    y: int = 0
    latencies: dict[Bucket, int] = field(default_factory=dict)

    def add(self, request: Request) -> None:
        self.requests += 1
        self.cancelled += request.status == "cancelled"
        self.errors += request.status == "error" or request.draft_errors > 0
        self.draft_errors += request.draft_errors > 0
        self.timeouts += request.status == "timeout"
        self.retries += request.retry > 0
        if request.steps > 0:
            self.x += request.steps + request.accepted
            self.y += request.steps
        if request.status == "ok":
            for metric, seconds in enumerate(request.seconds):
                if seconds is not None:
                    at = (metric, histogram.bucket(seconds))
                    self.latencies[at] = self.latencies.get(at, 0) + 1


def class_of(name: str, known: set[str]) -> str:
    """The class that a request is counted in, of those ``known``, which it may be added to."""
    if name not in known and len(known - {OTHER}) >= CLASSES:
        name = OTHER
    known.add(name)
    return name


def merged(parts: Collection[KeySums]) -> KeySums:
    """One key over all of its classes."""
    if len(parts) == 1:
        return next(iter(parts))
    whole = KeySums()
    for part in parts:
        for name in KEY_COUNTS:
            setattr(whole, name, getattr(whole, name) + getattr(part, name))
        for at, requests in part.latencies.items():
            whole.latencies[at] = whole.latencies.get(at, 0) + requests
    return whole


KEY_COUNTS = tuple(f.name for f in fields(KeySums) if f.name != "latencies")
"""What a key is counted by, in the order of ``KeySums``."""


@dataclass(slots=True)
class Totals:
    """Sums over the keys of one arm and class; ``stages`` counts requests by ledger generation.

    ``x`` and ``xx`` sum the tokens per verify step of ``n`` keys, and their squares.
    """

    requests: int = 0
    cancelled: int = 0
    keys: int = 0
    error_keys: int = 0
    draft_error_keys: int = 0
    timeout_keys: int = 0
    retry_keys: int = 0
    n: int = 0
    x: float = 0.0
    xx: float = 0.0
    stages: dict[int, int] = field(default_factory=dict)
    latencies: dict[Bucket, float] = field(default_factory=dict)

    def count(self, key: KeySums, sign: int) -> None:
        """Put a key in (``sign`` 1) or take it out (−1)."""
        self.requests += sign * key.requests
        self.cancelled += sign * key.cancelled
        self.keys += sign
        self.error_keys += sign * (key.errors > 0)
        self.draft_error_keys += sign * (key.draft_errors > 0)
        self.timeout_keys += sign * (key.timeouts > 0)
        self.retry_keys += sign * (key.retries > 0)
        if key.y > 0:
            per_step = key.x / key.y
            self.n += sign
            self.x += sign * per_step
            self.xx += sign * per_step * per_step
        of_metric = [0] * len(METRICS)
        for (metric, _), requests in key.latencies.items():
            of_metric[metric] += requests
        for at, requests in key.latencies.items():
            self.latencies[at] = self.latencies.get(at, 0.0) + sign * requests / of_metric[at[0]]

    def segment(self, arm: str, traffic_class: str | None, stage: int | None, metrics: Collection[str]) -> Segment:
        """As guards read it; ``stage`` is the generation of the newest stage."""
        sums = {name: getattr(self, name) for name in _SUMMED}
        x, xx = round(self.x, 9), round(self.xx, 9)  # what was taken out again leaves its rounding behind
        sums |= {"x": x, "y": float(self.n), "xx": xx, "yy": float(self.n), "xy": x}
        rounded = sorted((at, round(keys, 4)) for at, keys in self.latencies.items())
        latencies: dict[str, Counts] = {}
        for name in metrics:
            mine = [(at[1], keys) for at, keys in rounded if METRICS[at[0]] == name and keys > 0]
            if mine:
                latencies[name] = ([at for at, _ in mine], [keys for _, keys in mine])
        here = self.stages.get(stage, 0) if stage is not None else self.requests
        return Segment(arm, traffic_class, stage_requests=here, latencies=latencies, **sums)


_SUMMED = tuple(f.name for f in fields(Totals) if f.name not in ("stages", "latencies"))
Keys = dict[tuple[str, Hashable], dict[str, KeySums]]
"""(arm, key) → traffic class → what that key came to there."""


class Tally:
    """The totals of both arms, in each class and (None) in all; ``take`` adds requests to them."""

    def __init__(self) -> None:
        self.totals = defaultdict[tuple[str, str | None], Totals](Totals)

    def take(self, requests: Iterable[Request], keys: Keys) -> set[tuple[str, Hashable, str]]:
        """Count requests. ``keys`` must hold what is known of their keys, and is brought up to date.

        Gives (arm, key, class) of all that changed. It costs what the requests cost, not what was counted before.
        """
        of_key, known = defaultdict[tuple[str, Hashable], list[Request]](list), self.classes()
        for request in requests:
            counted = replace(request, traffic_class=class_of(request.traffic_class, known))
            of_key[request.arm, request.key].append(counted)
        changed = set[tuple[str, Hashable, str]]()
        for (arm, key), brought in of_key.items():
            classes = keys.setdefault((arm, key), {})
            touched = {request.traffic_class for request in brought}
            self._count(arm, classes, touched, -1)
            for request in brought:
                classes.setdefault(request.traffic_class, KeySums()).add(request)
                for name in (None, request.traffic_class):
                    stages = self.totals[arm, name].stages
                    stages[request.generation] = stages.get(request.generation, 0) + 1
            self._count(arm, classes, touched, 1)
            changed |= {(arm, key, name) for name in touched}
        return changed

    def classes(self) -> set[str]:
        """Those of either arm, at most CLASSES and OTHER."""
        return {name for _, name in self.totals if name is not None}

    def segments(self, stage: int | None = None, metrics: Collection[str] = METRICS) -> list[Segment]:
        """Of each arm all classes together first, then each class."""
        order = sorted(self.totals, key=lambda at: (at[0], at[1] is not None, at[1] or ""))
        return [self.totals[at].segment(*at, stage, metrics) for at in order]

    def _count(self, arm: str, classes: Mapping[str, KeySums], touched: Collection[str], sign: int) -> None:
        for name in touched:
            if name in classes:
                self.totals[arm, name].count(classes[name], sign)
        if classes:
            self.totals[arm, None].count(merged(classes.values()), sign)

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"arm": arm, "traffic_class": name}
            | {key: getattr(totals, key) for key in _SUMMED}
            | {"stages": list(totals.stages.items())}
            | {"latencies": [[*at, keys] for at, keys in totals.latencies.items() if abs(keys) > 1e-9]}
            for (arm, name), totals in self.totals.items()
        ]

    @classmethod
    def from_json(cls, trees: Iterable[Mapping[str, Any]]) -> Tally:
        tally = cls()
        for tree in trees:
            totals = Totals(**{key: tree[key] for key in _SUMMED})
            totals.stages = dict(map(tuple, tree["stages"]))
            totals.latencies = {(metric, bucket): keys for metric, bucket, keys in tree["latencies"]}
            tally.totals[tree["arm"], tree["traffic_class"]] = totals
        return tally
