"""What was drafted in shadow, read as the guards want it."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from uuid import UUID

import numpy as np
import pytest

from engine.contracts import CANARY, CONTROL
from engine.store.database import Database
from engine.store.repositories import shadow
from engine.store.repositories.shadow import ShadowRequest
from engine.store.segments import CLASSES, OTHER

NOW = datetime.now(UTC)


def test_a_key_weighs_one_in_all_classes_and_in_each(db: Database) -> None:
    rng = np.random.default_rng(0)
    written = [
        ShadowRequest(7, UUID(bytes=rng.bytes(16)), arm, 1, ("chat", "code")[n % 2], f"k{n % 5}", steps, 4 * steps,
                      int(rng.integers(0, 4 * steps + 1)), 0.1, int(n == 3))
        for n, steps in enumerate((0, *rng.integers(1, 40, 18).tolist(), 5_000, 0))
        for arm in (CANARY, CONTROL)
    ]  # fmt: skip
    with db.write() as session:
        shadow.write(session, written)
        shadow.write(session, written)  # twice is once
    with db.read() as session:
        found = shadow.segments(session, 7)
        assert shadow.segments(session, 8) == []
    assert [(s.arm, s.traffic_class) for s in found] == [
        (arm, name) for arm in (CANARY, CONTROL) for name in (None, "chat", "code")
    ]
    for s in found:
        mine = [r for r in written if r.arm == s.arm and s.traffic_class in (None, r.traffic_class)]
        tokens, steps = defaultdict[str, int](int), defaultdict[str, int](int)
        for r in mine:
            tokens[r.assignment_key] += r.steps + r.accepted
            steps[r.assignment_key] += r.steps
        x = [tokens[k] / steps[k] for k in steps if steps[k]]
        assert (s.requests, s.keys, s.n, s.y, s.yy) == (len(mine), len(steps), len(x), len(x), len(x))
        assert (s.x, s.xy, s.xx) == pytest.approx((sum(x), sum(x), sum(v * v for v in x)))
        assert s.error_keys == s.draft_error_keys == len({r.assignment_key for r in mine if r.draft_errors})


def test_classes_without_end_are_told_apart_up_to_a_bound(db: Database) -> None:
    rng, many = np.random.default_rng(0), 3 * CLASSES
    for first in (0, 1):
        with db.write() as session:  # in a later transaction, so seen later
            names = [f"user-{n:03}" for n in range(first * CLASSES, (1 + 2 * first) * CLASSES)]
            shadow.write(
                session,
                [
                    ShadowRequest(7, UUID(bytes=rng.bytes(16)), arm, 1, name, name, 10, 40, 20, 0.1)
                    for name in reversed(names)
                    for arm in (CANARY, CONTROL)
                ],
            )
    with db.read() as session:
        mine = [s for s in shadow.segments(session, 7) if s.arm == CANARY]
    assert {s.traffic_class for s in mine} == {None, OTHER, *(f"user-{n:03}" for n in range(CLASSES))}
    assert {s.traffic_class: s.requests for s in mine}[OTHER] == many - CLASSES
