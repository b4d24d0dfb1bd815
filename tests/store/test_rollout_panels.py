"""What is exported of rollouts is all there is, however much it is, and the same whenever it is asked for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import event, insert, select, update

from engine.contracts import RolloutState, Verdict
from engine.store.database import Database
from engine.store.models import RolloutDecisionRow
from engine.store.panels import PANELS
from engine.store.repositories import decisions, rollouts
from engine.store.repositories.overview import Slice
from tests.rollout.database_world import versions

AT = datetime(2026, 1, 7, 12, tzinfo=UTC)
MANY_ROLLOUTS, MANY_DECISIONS = 210, 650


def begun(db: Database, count: int, began: datetime = AT) -> list[int]:
    """So many rollouts, all but the last over."""
    champion, canary = versions(db, 2)
    status = {"stages": [{"began": began.isoformat()}]}
    made = []
    with db.write() as session:
        for number in range(count):
            state = RolloutState.RAMPING if number == count - 1 else RolloutState.DRAFT
            one = rollouts.create(
                session, name=f"r{number}", spec={}, spec_hash="h", canary=canary, champion=champion, actor="t",
                state=state, status=status, created_at=began,
            )  # fmt: skip
            made.append(one.id)
    return made


def decide(db: Database, rollout_id: int, count: int) -> None:
    """A decision a second."""
    one = {
        "rollout_id": rollout_id, "from_state": "RAMPING", "to_state": "RAMPING", "verdict": Verdict.PASS.value,
        "reason": "", "action": "none", "fencing_token": 1, "status_before": {},
        "evidence": {"guards": [{"name": "speed"}], "inputs": {"segments": []}},
    }  # fmt: skip
    with db.write() as session:
        rows = [one | {"decided_at": AT + timedelta(seconds=n)} for n in range(count)]
        session.execute(insert(RolloutDecisionRow), rows)


def saw(db: Database, rollout_id: int, *segments: list[dict[str, str]]) -> None:
    """Decisions that each saw these segments."""
    decide(db, rollout_id, len(segments))
    with db.write() as session:
        made = session.scalars(select(RolloutDecisionRow).where(RolloutDecisionRow.rollout_id == rollout_id)).all()
        for row, seen in zip(sorted(made, key=lambda row: row.id), segments, strict=True):
            row.evidence = {"inputs": {"segments": seen}}


def test_the_counts_of_all_rollouts_are_those_of_their_last_decisions_in_one_question(db: Database) -> None:
    first, second, third, _ = begun(db, 4)
    saw(db, first, [{"arm": "old"}], [{"arm": "canary"}, {"arm": "control"}], [])
    saw(db, second, [])
    saw(db, third, [{"arm": "canary"}])
    asked = list[str]()
    with db.read() as session:
        event.listen(session.connection(), "before_cursor_execute", lambda *given: asked.append(given[2]))
        found = PANELS["rollouts.counts"].read(session, Slice(AT - timedelta(hours=1), AT + timedelta(hours=1)))
    assert len(asked) == 1
    assert [(row["rollout"], row["arm"]) for row in found] == [(third, "canary"), (first, "canary"), (first, "control")]
    with db.read() as session:
        assert [row["arm"] for row in decisions.newest_counts(session, first)] == ["canary", "control"]
        assert decisions.newest_counts(session, second) == []


def test_many_rollouts_and_many_decisions_are_all_told(db: Database) -> None:
    made = begun(db, MANY_ROLLOUTS)
    decide(db, made[-1], MANY_DECISIONS)
    decide(db, made[0], 3)
    whole = Slice(AT - timedelta(hours=1), AT + timedelta(hours=1))
    with db.read() as session:
        assert [row["id"] for row in PANELS["rollouts.tried"].read(session, whole)] == made[::-1]
        found = PANELS["rollouts.decisions"].read(session, whole)
        two = PANELS["rollouts.decisions"].read(session, Slice(AT + timedelta(seconds=1), AT + timedelta(seconds=3)))
        assert not PANELS["rollouts.tried"].read(session, Slice(AT - timedelta(hours=2), AT - timedelta(hours=1)))
    assert [row["rollout"] for row in found] == [made[-1]] * MANY_DECISIONS + [made[0]] * 3
    assert [row["at"] for row in found[:MANY_DECISIONS]] == [AT + timedelta(seconds=n) for n in range(MANY_DECISIONS)]
    assert found[0]["guards"] == [{"name": "speed"}]
    assert [(row["rollout"], row["at"].second) for row in two] == [
        (made[-1], 1),
        (made[-1], 2),
        (made[0], 1),
        (made[0], 2),
    ]


def test_a_page_draws_a_long_rollout_from_its_beginning(db: Database) -> None:
    (made,) = begun(db, 1)
    decide(db, made, MANY_DECISIONS)
    with db.read() as session:
        turn = rollouts.decisions(session, made)[3].id
    with db.write() as session:
        session.execute(update(RolloutDecisionRow).where(RolloutDecisionRow.id == turn).values(to_state="HELD"))
    with db.read() as session:
        whole, some = decisions.verdicts(session, made), decisions.verdicts(session, made, 100)
        few = decisions.verdicts(session, made, 10_000)
    assert len(few) == MANY_DECISIONS
    assert 300 <= len(whole) <= 601
    assert 90 <= len(some) <= 103
    assert some[-1].decided_at == AT + timedelta(seconds=MANY_DECISIONS - 1)
    assert some[1].decided_at < AT + timedelta(seconds=7)
    assert turn in {one.id for one in some}
    assert [one.id for one in some] == sorted(one.id or 0 for one in some)


@pytest.mark.parametrize("ahead", [timedelta(0), timedelta(days=300)])
def test_hours_of_a_canary_that_serves_still_do_not_depend_on_the_window(db: Database, ahead: timedelta) -> None:
    began = datetime.now(UTC) - timedelta(hours=5)
    begun(db, 1, began)
    part = Slice(began - timedelta(minutes=1), began + timedelta(minutes=1) + ahead)
    with db.read() as session:
        (week,) = PANELS["rollouts.weeks"].read(session, part)
    assert week["canary_hours"] == pytest.approx(5.0, abs=0.1)


def test_a_week_that_ends_where_the_window_begins_has_no_part_in_it(db: Database) -> None:
    begun(db, 1, AT)
    monday = datetime(2026, 1, 12, tzinfo=UTC)
    with db.read() as session:
        assert not PANELS["rollouts.weeks"].read(session, Slice(monday, monday + timedelta(days=1)))
        before = Slice(monday - timedelta(minutes=1), monday + timedelta(days=1))
        assert len(PANELS["rollouts.weeks"].read(session, before)) == 1
