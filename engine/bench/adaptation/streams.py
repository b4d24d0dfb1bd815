"""The streams of requests: who comes when. Pure; no prompt comes twice in a stream.

A response is made once, greedily, and replayed under every arm: which tokens come does not depend on the policy.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Ids = tuple[int, ...]
STREAMS = ("mixed", "shift", "recurring", "gradual", "planted")


@dataclass(frozen=True, slots=True)
class Response:
    """One prompt and what the target answers to it."""

    traffic_class: str
    prompt_ids: Ids
    output_ids: Ids


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a stream: [first, last) and what is new in it; empty where everything is mixed."""

    traffic_class: str
    first: int
    last: int

    @property
    def second_half(self) -> range:
        return range((self.first + self.last) // 2, self.last)


@dataclass(frozen=True, slots=True)
class Stream:
    name: str
    requests: tuple[Response, ...]
    phases: tuple[Phase, ...]


def stream(name: str, classes: Mapping[str, Sequence[Response]], seed: int) -> Stream:
    """``seed`` shuffles the requests of each class and the order in which classes come.

    mixed: all at once. shift: one class after the other. recurring: the first half of A, of B, the rest of A, of B.
    gradual: from A to B with a share that grows linearly. planted: all at once, while every other update is bad.
    """
    rng = random.Random(f"{name} {seed}")
    order = sorted(classes)
    rng.shuffle(order)
    own = {name: rng.sample(list(classes[name]), len(classes[name])) for name in order}
    if name in ("mixed", "planted"):
        requests = [response for found in own.values() for response in found]
        rng.shuffle(requests)
        return Stream(name, tuple(requests), (Phase("", 0, len(requests)),))
    if name == "shift":
        return _in_turn(name, [(one, own[one]) for one in order])
    a, b = order[:2]
    if name == "recurring":
        half = {one: len(own[one]) // 2 for one in (a, b)}
        return _in_turn(
            name, [(a, own[a][: half[a]]), (b, own[b][: half[b]]), (a, own[a][half[a] :]), (b, own[b][half[b] :])]
        )
    if name == "gradual":
        left, n = {one: list(own[one]) for one in (a, b)}, len(own[a]) + len(own[b])
        found = []
        for at in range(n):
            wanted = b if rng.random() < at / n else a
            other = a if wanted == b else b
            found.append((left[wanted] or left[other]).pop())
        return Stream(name, tuple(found), (Phase("", 0, n),))
    raise ValueError(f"no stream {name!r}; there are {STREAMS}")


def _in_turn(name: str, parts: Sequence[tuple[str, Sequence[Response]]]) -> Stream:
    phases, requests = [], list[Response]()
    for traffic_class, found in parts:
        phases.append(Phase(traffic_class, len(requests), len(requests) + len(found)))
        requests += found
    return Stream(name, tuple(requests), tuple(phases))
