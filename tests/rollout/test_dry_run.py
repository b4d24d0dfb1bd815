"""A dry run on past traffic whose requests are alike within a key, as those of one conversation are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pytest

from engine.rollout import dry_run, specs
from engine.rollout.guards import TokensPerStep
from engine.rollout.records import evidence_to_json, status_to_json
from engine.store.database import Database
from engine.store.repositories.evidence import Past, past
from engine.store.segments import Request, Tally
from tests.rollout import database_world as world
from tests.rollout.world import ramping

PER_KEY = 20


def conversations(rng: np.random.Generator, keys: int) -> Past:
    """Requests of many keys in turns; each key has an acceptance of its own, every arm made of them is the same."""
    level = rng.beta(3, 3, keys)
    found = []
    for n in range(keys * PER_KEY):
        key, steps = int(rng.integers(max(1, n // PER_KEY), n // PER_KEY + 20) % keys), int(rng.integers(10, 40))
        accepted = int(rng.binomial(4 * steps, level[key]))
        found.append(Request("", f"c{key}", 1, "chat", "ok", 0, steps, accepted, (1.0, 0.1, 0.02)))
    return Past(found, len(found) - 1.0)


def fired(past: Past, splits: int = 15) -> int:
    return dry_run.equal_arms(specs.preset("standard"), past, splits).fired.count(TokensPerStep.kind)


def test_identical_arms_of_conversations_are_not_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were every request counted as one of its own, a third of the splits would be."""
    past = conversations(np.random.default_rng(0), 100)
    assert fired(past) == 0
    split = dry_run._split

    def per_request(past: Sequence[Request], salt: str) -> tuple[list[Request], ...]:
        return tuple([replace(r, key=n) for n, r in enumerate(arm)] for arm in split(past, salt))

    monkeypatch.setattr(dry_run, "_split", per_request)
    assert fired(past) >= 3


@pytest.mark.parametrize("requests", [1, 2])
def test_a_nearly_empty_database_gives_no_times(requests: int) -> None:
    past = Past([Request("", f"c{n}", 1, "chat", "ok", 0, 20, 10, (1.0, 0.1, 0.02)) for n in range(requests)], 0.0)
    spec = specs.preset("standard")
    told = list(dry_run.report(spec, dry_run.equal_arms(spec, past, 4), [], []))
    assert told[1:] == ["too little past traffic to reckon how long anything takes"]


def independent(rng: np.random.Generator, requests: int) -> Past:
    """Each request a key of its own, a request a second."""
    found = []
    for n in range(requests):
        steps, slow = int(rng.integers(10, 40)), float(rng.lognormal(0, 0.3))
        accepted, failed = int(rng.binomial(steps, 0.5)), rng.random() < 0.005
        seconds = (slow, slow / 10, slow / 50)
        found.append(Request("", f"c{n}", 1, "chat", "error" if failed else "ok", 0, steps, accepted, seconds))
    return Past(found, requests - 1.0)


def test_each_guard_says_what_it_needs_to_find_a_worse_canary() -> None:
    spec, past = specs.preset("standard"), independent(np.random.default_rng(0), 3_000)
    found = {one.guard: one for one in dry_run.planted(spec, past, 3)}
    assert set(found) == {"tokens_per_step", "e2e_p50", "e2e_p95", "errors", "timeouts", "retries"}
    assert all(len(one.requests) == 3 for one in found.values())
    assert max(found["e2e_p50"].requests) < min(found["errors"].requests)
    equal = dry_run.equal_arms(spec, past, 3)
    told = "\n".join(dry_run.report(spec, equal, list(found.values()), []))
    assert "e2e_p50: latencies half as long again would be found after" in told
    assert "min at 1 requests/s" in told


def test_what_past_traffic_cannot_show_is_said() -> None:
    spec, past = specs.preset("standard"), independent(np.random.default_rng(0), 120)
    found = dry_run.planted(spec, past, 3)
    told = "\n".join(dry_run.report(spec, dry_run.equal_arms(spec, past, 3), found, []))
    assert "errors: 5 % more errors would mostly not be found in 60 requests per arm" in told


def test_what_is_found_early_is_found_at_the_first_steps_weight() -> None:
    """100 requests of a tenth of one request a second take 1,000 s, not the 200 that half of the traffic would take."""
    spec = specs.preset("standard")
    assert dry_run.seconds(spec, 1.0, 100) == pytest.approx(60 + 1_000)
    assert dry_run.seconds(spec, 1.0, 150) == pytest.approx(60 + 1_000 + 60 + 50 / 0.25)
    assert dry_run.seconds(spec, 1.0, 1_200) == pytest.approx(3 * 60 + 1_000 + 400 + 1_000 / 0.5)


def test_a_rate_of_false_rollbacks_is_told_with_its_bound_and_a_slice_that_cannot_be_tried_is_named() -> None:
    spec = replace(specs.preset("standard"), slices=("beta",))
    first, second = list(dry_run.report(spec, dry_run.Equal(40, (), (), 100, 0.0), [], []))[:2]
    assert "do not say which slice" in first
    assert "0 of 40" in second
    assert "up to 8.8 % at 95 %" in second


def test_past_traffic_is_that_of_the_classes_and_tenants_that_are_tried(db: Database) -> None:
    world.versions(db, 2)
    world.first_plan(db, champion=2, fallback=1)
    now = datetime(2026, 3, 1, tzinfo=UTC)
    for traffic_class, requests in (("chat", 30), ("batch", 3)):
        world.serve(db, np.random.default_rng(requests), now, requests, {1: 0.0, 2: 1.0}, traffic_class=traffic_class)
    with db.read() as session:
        assert len(past(session, 2, now).requests) == 33
        assert len(past(session, 2, now, traffic_classes=("batch",)).requests) == 3
        assert len(past(session, 2, now, tenants=("acme",)).requests) == 0


def test_a_past_incident_is_judged_with_its_restarts_and_says_what_it_cannot_know() -> None:
    world_now = ramping()
    world_now.both(30)
    world_now.tick(10)
    status = replace(world_now.status, restarts=(world_now.now, world_now.now))
    evidence = evidence_to_json(world_now.evidence(), (), (), status)
    decision = SimpleNamespace(evidence=evidence, status_before=status_to_json(status), decided_at=world_now.now)
    found = dry_run.incident(specs.preset("fast"), 7, "DONE", [decision])  # type: ignore[list-item]
    assert found.guard == "fuse_restarts"
    calm = SimpleNamespace(**vars(decision) | {"status_before": status_to_json(world_now.status)})
    found = dry_run.incident(specs.preset("fast"), 7, "DONE", [calm])  # type: ignore[list-item]
    assert (found.at, found.unknown) == (None, ("cost",))


def test_a_key_weighs_one_in_a_histogram() -> None:
    """Ten requests of one key and one of another are two observations."""
    past = [Request("canary", "busy", 1, "chat", "ok", 0, 20, 10, (1.0, 0.1, None)) for _ in range(10)]
    past.append(Request("canary", "rare", 1, "chat", "ok", 0, 20, 10, (2.0, 0.1, 0.02)))
    tally = Tally()
    tally.take(past, {})
    found = tally.segments()[0]
    assert found.latencies["e2e"][1] == pytest.approx([1.0, 1.0])
    assert sum(found.latencies["tpot"][1]) == pytest.approx(1.0)
