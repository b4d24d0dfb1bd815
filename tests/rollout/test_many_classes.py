"""Clients name traffic classes: one for every user must neither swell a decision nor hide a class that is ruined."""

from __future__ import annotations

import numpy as np

from engine.contracts import CANARY, CONTROL, Verdict
from engine.rollout import specs
from engine.rollout.evaluate import evaluate
from engine.store.segments import CLASSES, OTHER, Keys, Request, Tally


def requests(users: int) -> list[Request]:
    """Of both arms in turn: every second of class batch, ruined on the canary, the rest each of a class of its own."""
    rng, found = np.random.default_rng(0), []
    for n in range(users):
        for arm in (CANARY, CONTROL):
            for name in ("batch", f"user-{n}"):
                accepted = int(rng.binomial(40, 0.2 if (arm, name) == (CANARY, "batch") else 0.6))
                found.append(Request(arm, f"{name}-{n}-{arm}", 1, name, "ok", 0, 20, accepted, (1.0, 0.1, 0.02, 0.02)))
    return found


def test_the_first_classes_are_told_apart_and_the_rest_are_one() -> None:
    tally, keys = Tally(), Keys()
    for some in (requests(300)[k : k + 7] for k in range(0, 1_200, 7)):
        tally.take(some, keys)
        tally = Tally.from_json(tally.to_json())
    found = tally.segments()
    assert tally.classes() == {"batch", OTHER, *(f"user-{n}" for n in range(CLASSES - 1))}
    for arm in (CANARY, CONTROL):
        mine = {s.traffic_class: s for s in found if s.arm == arm}
        assert len(mine) == CLASSES + 2
        assert mine[None].requests == mine[None].keys == 600 == sum(s.requests for name, s in mine.items() if name)
        assert mine[OTHER].requests == 300 - (CLASSES - 1)
    judged = {g.guard: g for g in evaluate(specs.preset("standard"), found)}["tokens_per_step"]
    assert (judged.verdict, judged.worst) == (Verdict.FAIL, "batch")


def test_a_retry_of_a_key_stays_in_the_class_it_was_counted_in() -> None:
    tally, keys = Tally(), Keys()
    tally.take(requests(200), keys)
    before = {(s.arm, s.traffic_class): s.keys for s in tally.segments()}
    tally.take(requests(200), keys)
    assert {(s.arm, s.traffic_class): s.keys for s in tally.segments()} == before
