"""Replicas are compared by the database's clock, and a rollback is claimed of all that may still serve."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from engine.contracts import ProposerKind, ReplicaState, ServingPlan
from engine.store.database import Database, server_clock
from engine.store.repositories import plans, policies, replicas
from engine.store.repositories.replicas import NameTaken


@pytest.fixture
def plan(db: Database) -> ServingPlan:
    with db.write() as session:
        version = policies.register(
            session, digest="d", kind=ProposerKind.NGRAM, num_speculative_tokens=4, manifest={}
        ).version
        return [plans.append(session, champion=version, fallback=version, actor="t", reason="t") for _ in range(3)][1]


STARTED = datetime(2026, 1, 1, tzinfo=UTC)


def beat(db: Database, name: str, generation: int, ago: float = 0.0, started: datetime = STARTED) -> None:
    """A heartbeat so many seconds before now."""
    at = db.now() - timedelta(seconds=ago)
    with db.write() as session:
        replicas.beat(session, ReplicaState(name, "http://r", "m", started, at, generation, (), {}))


def test_a_plan_is_effective_where_it_or_a_later_one_is_observed(db: Database, plan: ServingPlan) -> None:
    beat(db, "first", plan.generation)
    beat(db, "skipped", plan.generation + 1)
    beat(db, "behind", plan.generation - 1)
    beat(db, "silent", plan.generation - 1, ago=30.0)
    beat(db, "gone", plan.generation - 1, ago=300.0)
    with db.write() as session:
        for name, generation, after in (("first", plan.generation, 0.25), ("skipped", plan.generation + 1, 0.75)):
            plans.observe(session, name, generation, plan.created_at + timedelta(seconds=after), 0.0)
    with db.read() as session:
        found = replicas.effect(session, plan)
    assert found.seconds == {"first": 0.25, "skipped": 0.75}
    assert (found.behind, found.silent, found.slowest) == (("behind",), ("silent",), 0.75)
    assert not found.is_complete


def test_only_what_was_seen_everywhere_is_complete(db: Database, plan: ServingPlan) -> None:
    with db.read() as session:
        assert not replicas.effect(session, plan).is_complete, "nobody is there to have seen it"
    beat(db, "r0", plan.generation)
    with db.read() as session:
        assert replicas.effect(session, plan).is_complete
    beat(db, "r1", plan.generation - 1, ago=30.0)
    with db.read() as session:
        assert not replicas.effect(session, plan).is_complete, "a silent one may still serve the canary"


def test_a_replica_that_leaves_takes_only_its_own_row(db: Database) -> None:
    beat(db, "r0", 1, ago=15.0)
    beat(db, "r0", 1, started=STARTED + timedelta(days=1))  # started again under the same name
    with db.write() as session:
        replicas.leave(session, "r0", STARTED)
        assert [r.replica_id for r in replicas.live(session)] == ["r0"]


def test_two_that_live_never_share_a_name(db: Database) -> None:
    beat(db, "r0", 1)
    with pytest.raises(NameTaken, match=r"engine\.replica_id"), db.write() as session:
        replicas.enter(session, "r0", server_clock(session))
    with pytest.raises(NameTaken):
        beat(db, "r0", 1, started=STARTED + timedelta(days=1))
    beat(db, "r0", 1)


def test_one_that_follows_a_crash_knows_it(db: Database) -> None:
    with db.write() as session:
        assert not replicas.enter(session, "r0", server_clock(session)), "it is the first"
    beat(db, "r0", 1, ago=15.0)
    with db.write() as session:
        assert replicas.enter(session, "r0", server_clock(session))
        replicas.leave(session, "r0", STARTED)
        assert not replicas.enter(session, "r0", server_clock(session)), "it had said goodbye"
