"""Taking traces in: once each, in order, on one side for ever; what may not teach does not; the buffer is bounded."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import numpy as np
import pytest
from sqlalchemy import select, update

from engine.learner import traces
from engine.learner.traces import TraceBuffer, is_held_out, request_hash
from engine.store.database import Database
from engine.store.models import LearningCursorRow, LearningIntakeRow, TraceRow
from engine.store.repositories import intake, tenants
from tests.rollout.database_world import MODEL, remember

NOW = datetime.now(UTC) - timedelta(hours=1)
Text = tuple[str, list[int], list[int]]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def texts(count: int, name: str = "chat", first: int = 0) -> list[Text]:
    return [(name, [first + n, 7], [n, n + 1, n + 2]) for n in range(count)]


def rows(db: Database) -> list[LearningIntakeRow]:
    with db.read() as session:
        return list(session.scalars(select(LearningIntakeRow).order_by(LearningIntakeRow.ordinal)))


def test_each_trace_is_taken_in_once_in_the_order_of_writing(
    db: Database, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "TAKEN_AT_ONCE", 7)  # many transactions
    ids = remember(db, NOW, texts(20), rng)
    assert traces.take_in(db, 0.25) == 20
    ids += remember(db, NOW + timedelta(minutes=1), texts(10, first=100), rng)
    assert traces.take_in(db, 0.25) == 10
    assert traces.take_in(db, 0.25) == 0
    found = rows(db)
    assert [row.trace_id for row in found] == ids
    assert [row.ordinal for row in found] == list(range(1, 31))
    assert sorted(row.position for row in found if row.held_out) == list(range(1, 1 + sum(r.held_out for r in found)))


def test_a_repeated_prompt_lies_on_one_side_for_ever(db: Database, rng: np.random.Generator) -> None:
    """Also when the share has changed in between. Splitting by trace id, as it once was, fails here."""
    repeated = texts(10)
    for minute, share in enumerate((0.25, 0.25, 0.9, 0.01)):
        remember(db, NOW + timedelta(minutes=minute), repeated, rng)
        traces.take_in(db, share)
    sides: dict[int, set[bool]] = {}
    for row in rows(db):
        sides.setdefault(row.request_hash, set()).add(row.held_out)
    assert len(sides) == 10
    assert all(len(found) == 1 for found in sides.values())
    assert {side for found in sides.values() for side in found} == {True, False}


def test_the_hash_is_of_the_prompt_alone_and_splits_by_share() -> None:
    assert request_hash([1, 2, 3]) == request_hash((1, 2, 3)) != request_hash([1, 2])
    held = sum(is_held_out(request_hash([n]), 0.25) for n in range(4_000))
    assert held == pytest.approx(1_000, abs=100)


def test_what_opted_out_does_not_teach(db: Database, rng: np.random.Generator) -> None:
    """By header, by tenant, and by a tenant that changes its mind after its traces were taken in."""
    with db.write() as session:
        tenants.allow_training(session, "shy", False, "t", NOW)
    remember(db, NOW, texts(20), rng, trainable=False)
    remember(db, NOW + timedelta(seconds=1), texts(20), rng, tenant="shy")
    remember(db, NOW + timedelta(seconds=2), texts(20), rng, status="error")
    remember(db, NOW + timedelta(seconds=3), texts(20), rng, tenant="open")
    traces.take_in(db, 0.25)
    assert {row.tenant for row in rows(db)} == {"open"}
    buffer = TraceBuffer(100)
    with db.read() as session:
        assert buffer.refresh(session, MODEL)
    with db.write() as session:
        tenants.allow_training(session, "open", False, "t", NOW)
    with db.read() as session:
        assert buffer.refresh(session, MODEL) == ()
        assert traces.held_out(session, MODEL, 0) == []


def test_the_buffer_is_half_recent_and_half_a_sample_of_each_class(db: Database, rng: np.random.Generator) -> None:
    remember(db, NOW, texts(60, "code"), rng)
    remember(db, NOW + timedelta(minutes=1), texts(60, "chat", 1_000), rng)
    remember(db, NOW + timedelta(minutes=2), texts(60, "batch", 2_000), rng)
    traces.take_in(db, 1e-9)
    with db.read() as session:
        found = TraceBuffer(40).refresh(session, MODEL)
        assert found == TraceBuffer(40).refresh(session, MODEL)  # anybody draws the same sample
    assert [t.traffic_class for t in found[-20:]] == ["batch"] * 20
    assert [t.ordinal for t in found[-20:]] == list(range(161, 181))
    assert traces.classes(found[:-20]) == {"batch": 6, "chat": 6, "code": 6}


def test_a_buffer_that_grew_is_the_buffer_that_is_read_at_once(db: Database, rng: np.random.Generator) -> None:
    grown = TraceBuffer(30)
    for minute in range(6):
        remember(db, NOW + timedelta(minutes=minute), texts(15, ("code", "chat")[minute % 2], 100 * minute), rng)
        traces.take_in(db, 0.25)
        with db.read() as session:
            mine = grown.refresh(session, MODEL)
            assert mine == TraceBuffer(30).refresh(session, MODEL)
            assert len(mine) <= 30


def test_what_is_not_settled_waits(db: Database, rng: np.random.Generator) -> None:
    """A transaction that is still open may hold older traces: the cursor must not pass it."""
    remember(db, NOW, texts(5), rng)
    with db.write() as late:
        late.execute(update(TraceRow).values(retry=1))  # gives the open transaction an id
        remember_time = datetime.now(UTC)
        remember(db, remember_time, texts(5, first=50), rng)
        assert traces.take_in(db, 0.25) == 5
    assert traces.take_in(db, 0.25) == 5


def test_what_is_passed_over_is_looked_at_once(
    db: Database, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traffic that is mostly not trainable: the cursor follows it, not only what was taken in."""
    monkeypatch.setattr(traces, "TAKEN_AT_ONCE", 4)
    remember(db, NOW, texts(6), rng)
    passed = remember(db, NOW + timedelta(seconds=1), texts(30, first=100), rng, trainable=False)
    assert traces.take_in(db, 0.25) == 6
    assert cursor(db) == passed[-1]
    more = remember(db, NOW + timedelta(seconds=2), texts(5, first=200), rng, trainable=False)
    assert traces.take_in(db, 0.25) == 0
    assert cursor(db) == more[-1]
    assert traces.take_in(db, 0.25) == 0
    remember(db, NOW + timedelta(seconds=3), texts(9, first=300), rng)
    assert traces.take_in(db, 0.25) == 9
    assert len(rows(db)) == 15


def test_a_transaction_that_was_undone_moves_nothing(db: Database, rng: np.random.Generator) -> None:
    remember(db, NOW, texts(8), rng)

    def killed() -> None:
        with db.write() as session:
            assert len(intake.take_in(session, request_hash, lambda key: False, 5)) == 5
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert cursor(db) is None
    assert traces.take_in(db, 0.25) == 8


def cursor(db: Database) -> UUID | None:
    with db.read() as session:
        return session.scalar(select(LearningCursorRow.trace_id))


def test_positions_count_by_class_and_side(db: Database, rng: np.random.Generator) -> None:
    remember(db, NOW, [*texts(30, "code"), *texts(30, "chat", 500)], rng)
    traces.take_in(db, 0.25)
    groups: dict[tuple[str, bool], list[int]] = {}
    for row in rows(db):
        groups.setdefault((row.traffic_class, row.held_out), []).append(row.position)
    assert all(positions == list(range(1, len(positions) + 1)) for positions in groups.values())
    with db.read() as session:
        assert intake.count(session, MODEL) == 60
        assert intake.count(session, MODEL, after=20) == 40
