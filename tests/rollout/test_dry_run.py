"""A dry run on past traffic whose requests are alike within a key, as those of one conversation are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from engine.rollout import dry_run, specs
from engine.rollout.guards import TokensPerStep
from engine.store.repositories.evidence import PastRequest

NOW = datetime(2026, 3, 1, tzinfo=UTC)
PER_KEY = 20


def conversations(rng: np.random.Generator, keys: int) -> list[PastRequest]:
    """Requests of many keys in turns; each key has an acceptance of its own, every arm made of them is the same."""
    level = rng.beta(3, 3, keys)
    found = []
    for n in range(keys * PER_KEY):
        key, steps = int(rng.integers(max(1, n // PER_KEY), n // PER_KEY + 20) % keys), int(rng.integers(10, 40))
        accepted = int(rng.binomial(4 * steps, level[key]))
        at = NOW + timedelta(seconds=n)
        found.append(PastRequest(at, f"c{key}", "chat", "ok", 0, steps, accepted, 1.0, 0.1, 0.02))
    return found


def fired(past: Sequence[PastRequest], splits: int = 15) -> int:
    return dry_run.equal_arms(specs.preset("standard"), past, splits).fired.count(TokensPerStep.kind)


def test_identical_arms_of_conversations_are_not_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were every request counted as one of its own, a third of the splits would be."""
    past = conversations(np.random.default_rng(0), 100)
    assert fired(past) == 0
    summed = dry_run._segment

    def per_request(arm: str, name: str | None, requests: Sequence[PastRequest]):  # type: ignore[no-untyped-def]
        return summed(arm, name, [replace(r, assignment_key=str(n)) for n, r in enumerate(requests)])

    monkeypatch.setattr(dry_run, "_segment", per_request)
    assert fired(past) >= 3


@pytest.mark.parametrize("requests", [1, 2])
def test_a_nearly_empty_database_gives_no_times(requests: int) -> None:
    past = [PastRequest(NOW, f"c{n}", "chat", "ok", 0, 20, 10, 1.0, 0.1, 0.02) for n in range(requests)]
    spec = specs.preset("standard")
    told = list(dry_run.report(spec, dry_run.equal_arms(spec, past, 4), []))
    assert told[1:] == ["too little past traffic to reckon how long anything takes"]


def test_a_key_weighs_one_in_a_histogram() -> None:
    """Ten requests of one key and one of another are two observations."""
    past = [PastRequest(NOW, "busy", "chat", "ok", 0, 20, 10, 1.0, 0.1, None) for _ in range(10)]
    past.append(PastRequest(NOW, "rare", "chat", "ok", 0, 20, 10, 2.0, 0.1, 0.02))
    found = dry_run._segment("canary", None, past)
    assert found.latencies["e2e"][1] == pytest.approx([1.0, 1.0])
    assert sum(found.latencies["tpot"][1]) == pytest.approx(1.0)
