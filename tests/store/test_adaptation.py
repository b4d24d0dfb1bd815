"""What a version cost and saved: refused attempts are paid by the next version, savings follow what it served."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.components.adaptation import sentence
from engine.store.database import Database
from engine.store.repositories import adaptation, learning
from engine.store.repositories.adaptation import Adaptation, Served
from tests.app.seed import seed


def served(requests: int = 10) -> Served:
    """100 steps that emitted 200 tokens; the champion of then 1.6 a step and 25 ms a token, this one 2 and 20 ms."""
    return Served(requests, 210, 100, 100, parent_length=1.6, own_length=2.0, parent_ms=25.0, own_ms=20.0)


def test_savings_are_tokens_times_what_a_token_costs_less() -> None:
    one = served()
    assert one.steps_saved == pytest.approx(25.0)
    assert one.saved_s == pytest.approx(200 * 0.005)
    assert Served(10, 210, 100, 100).saved_s == 0.0  # a class that was not judged claims nothing


def test_break_even_is_where_the_savings_meet_the_cost() -> None:
    cost = Adaptation(3, 1.0, 0.5, 0.1, 2.0, 1, 3.0, {"chat": served(), "code": served()})
    assert cost.cost_s == 5.0
    assert cost.saved_s == pytest.approx(2.0)
    assert cost.net_s == pytest.approx(-3.0)
    assert cost.break_even_requests == pytest.approx(50.0)
    assert cost.derived(None)["net_money"] is None
    assert cost.derived(3_600.0)["net_money"] == pytest.approx(-3.0)
    assert "has not paid for itself yet" in sentence(cost, 2.0)
    worse = Adaptation(3, 1.0, 0.5, 0.1, 2.0, 0, 0.0, {"chat": Served(5, 9, 4, 4, 1.0, 1.0, 20.0, 25.0)})
    assert worse.break_even_requests is None
    assert "saved nothing" in sentence(worse, None)


def test_the_database_knows_all_of_it(db: Database, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    seed(db, tmp_path / "spill")
    with db.read() as session:
        learned = adaptation.all_versions(session, now + timedelta(minutes=1))
        attempts = learning.attempts(session)
        built_in = adaptation.of_version(session, 1, now)
        waste = adaptation.wasted_cpu_s(session)
    assert built_in is None
    assert {one.version for one in learned} == {a.version for a in attempts if a.version is not None}
    assert sum(one.cost_s for one in learned) + waste == pytest.approx(sum(a.cpu_s for a in attempts))
    assert sum(one.refused for one in learned) == sum(a.version is None for a in attempts)
    served_most = max(learned, key=lambda one: one.requests)
    assert served_most.requests > 0
    assert set(served_most.classes) <= {"chat", "code", "long_form", "batch"}
    assert served_most.saved_s == pytest.approx(sum(one.saved_s for one in served_most.classes.values()))
