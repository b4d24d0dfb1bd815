"""The ledger only grows, in order, once per intention; a rollback needs nothing but the database."""

from __future__ import annotations

import contextlib
import threading
from datetime import UTC, datetime

import psycopg
import pytest

from engine.contracts import CANARY, CONTROL, Arm, ProposerKind, SlipstreamError
from engine.store.connection import libpq_url, transaction
from engine.store.database import Database
from engine.store.repositories import plans, policies


@pytest.fixture
def versions(db: Database) -> list[int]:
    with db.write() as session:
        return [
            policies.register(
                session, digest=f"d{n}", kind=ProposerKind.NGRAM, num_speculative_tokens=4, manifest={}
            ).version
            for n in range(3)
        ]


def append(db: Database, champion: int, **extra: object) -> int:
    with db.write() as session:
        values: dict[str, object] = {"champion": champion, "fallback": champion, "actor": "t", "reason": "t"}
        return plans.append(session, **(values | extra)).generation  # type: ignore[arg-type]


def start_canary(db: Database, champion: int, canary: int) -> int:
    arms = (Arm(CANARY, canary, 0.25), Arm(CONTROL, champion, 0.25))
    return append(db, champion, arms=arms, rollback_to=champion)


def test_generations_count_up_and_rows_come_back_as_they_were(db: Database, versions: list[int]) -> None:
    assert [append(db, versions[0]) for _ in range(3)] == [1, 2, 3]
    start_canary(db, versions[0], versions[1])
    with db.read() as session:
        plan = plans.latest(session)
        assert plan is not None
        assert plan.arm(CANARY) == Arm(CANARY, versions[1], 0.25)
        assert plan.versions == {versions[0], versions[1]}
        assert [p.generation for p in plans.history(session)] == [4, 3, 2, 1]


def test_many_writers_never_share_a_generation(db: Database, versions: list[int]) -> None:
    made: list[int] = []
    threads = [threading.Thread(target=lambda: made.append(append(db, versions[0]))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == list(range(1, 13))


def test_a_stale_writer_is_refused(db: Database, versions: list[int]) -> None:
    append(db, versions[0])
    append(db, versions[0])
    with pytest.raises(plans.StalePlan, match="generation 2, not 1"):
        append(db, versions[1], expected_generation=1)


def test_the_same_click_twice_is_one_plan(db: Database, versions: list[int]) -> None:
    append(db, versions[0])
    start_canary(db, versions[0], versions[1])
    for _ in range(2):
        with db.write() as session:
            assert plans.roll_back(session, actor="t", reason="t", idempotency_key="click").generation == 3
    with db.read() as session:
        assert len(plans.history(session)) == 3


def test_rollback_goes_to_the_champion_recorded_at_the_start(db: Database, versions: list[int]) -> None:
    append(db, versions[2])
    append(db, versions[0])
    start_canary(db, versions[0], versions[1])
    with db.write() as session:
        plan = plans.roll_back(session, actor="t", reason="bad")
    assert (plan.champion, plan.arms, plan.rollback_to) == (versions[0], (), None)


def test_a_promotion_is_taken_back_once_however_often_it_is_asked(db: Database, versions: list[int]) -> None:
    """A second rollback, by another person or by a guard, must not bring the bad version back."""
    append(db, versions[0])
    start_canary(db, versions[0], versions[1])
    append(db, versions[1], rollback_to=versions[0])  # promoted
    for _ in range(3):
        with db.write() as session:
            plan = plans.roll_back(session, actor="t", reason="bad")
        assert (plan.champion, plan.generation) == (versions[0], 4)


def test_a_champion_is_one_since_it_took_over_whatever_was_tried_beside_it(db: Database, versions: list[int]) -> None:
    first, second, third = versions
    took_over = [append(db, first), append(db, second)][-1]
    for _ in range(3):
        start_canary(db, second, third)
        append(db, second)
    with db.read() as session:
        newest, begun, at_first = (
            plans.latest(session),
            plans.get(session, took_over),
            plans.get(session, took_over - 1),
        )
        assert newest is not None
        assert begun is not None
        assert at_first is not None
        assert plans.champion_since(session, newest) == begun.created_at
        assert plans.champion_since(session, at_first) == at_first.created_at


def test_an_earlier_champion_must_be_named(db: Database, versions: list[int]) -> None:
    append(db, versions[0])
    append(db, versions[1])
    with db.write() as session:
        assert plans.roll_back(session, actor="t", reason="?").generation == 2
    with db.write() as session:
        assert plans.roll_back(session, actor="t", reason="bad", to=versions[0]).champion == versions[0]


def test_an_unknown_version_is_refused_by_name(db: Database, versions: list[int]) -> None:
    append(db, versions[0])
    with pytest.raises(SlipstreamError, match="no policy version 999"), db.write() as session:
        plans.roll_back(session, actor="t", reason="t", to=999)


def chain(db: Database, *retired: int) -> list[int]:
    """Four versions, each the parent of the next; those at these places are retired."""
    made: list[int] = []
    with db.write() as session:
        for n in range(4):
            version = policies.register(
                session, digest=f"c{n}", kind=ProposerKind.NGRAM, num_speculative_tokens=4, manifest={},
                parent_version=made[-1] if made else None,
            ).version  # fmt: skip
            made.append(version)
        policies.retire(session, [made[n] for n in retired], "forgotten", datetime.now(UTC))
    return made


def test_what_is_retired_is_not_served_again(db: Database) -> None:
    none, _, retired, last = chain(db, 2)
    append(db, last, fallback=none)
    refused: list[dict[str, object]] = [
        {"champion": retired},
        {"champion": last, "arms": (Arm(CANARY, retired, 0.1),)},
        {"champion": last, "rollback_to": retired},
    ]
    for plan in refused:
        with pytest.raises(plans.Retired, match=f"v{retired}"):
            append(db, **({"fallback": none} | plan))  # type: ignore[arg-type]
    with pytest.raises(plans.Retired, match=f"v{retired}"), db.write() as session:
        plans.roll_back(session, actor="t", reason="t", to=retired)
    assert append(db, retired, fallback=retired) == 2  # something must serve


@pytest.mark.parametrize(("retired", "expected"), [((), 2), ((2,), 1), ((1, 2), 0), ((0, 1, 2), 0)])
def test_a_rollback_to_a_retired_champion_goes_to_its_nearest_ancestor(
    db: Database, retired: tuple[int, ...], expected: int
) -> None:
    versions = chain(db)
    append(db, versions[2], fallback=versions[0])
    append(db, versions[3], fallback=versions[0], rollback_to=versions[2])
    with db.write() as session:
        policies.retire(session, [versions[n] for n in retired], "forgotten", datetime.now(UTC))
    with db.write() as session:
        assert plans.roll_back(session, actor="t", reason="bad").champion == versions[expected]


def test_a_rollback_never_goes_to_what_it_takes_back(db: Database) -> None:
    """The canary is the parent of the champion, tried once more; the champion is retired meanwhile."""
    versions = chain(db)
    append(db, versions[2], fallback=versions[0])
    arms = (Arm(CANARY, versions[1], 0.25), Arm(CONTROL, versions[2], 0.25))
    append(db, versions[2], fallback=versions[0], arms=arms, rollback_to=versions[2])
    with db.write() as session:
        policies.retire(session, [versions[2]], "forgotten", datetime.now(UTC))
    with db.write() as session:
        assert plans.roll_back(session, actor="t", reason="bad").champion == versions[0]


def test_replicas_hear_of_a_plan_when_it_commits(db: Database, versions: list[int]) -> None:
    with psycopg.connect(libpq_url(db.url), autocommit=True) as listener:
        listener.execute(f"LISTEN {plans.CHANNEL}")
        append(db, versions[0])
        heard = next(listener.notifies(timeout=5, stop_after=1))
    assert heard.payload == "1"


def test_a_failed_write_leaves_no_generation_behind(db: Database, versions: list[int]) -> None:
    with pytest.raises(SlipstreamError, match="do not exist: v999"):
        append(db, 999)
    assert append(db, versions[0]) == 1


def test_observations_are_kept_per_replica(db: Database, versions: list[int]) -> None:
    generation = append(db, versions[0])
    now = datetime.now(UTC)
    with db.write() as session:
        plans.observe(session, "a", generation, now, 0.1)
        plans.observe(session, "b", generation, now, 0.0, error="no such artifact")
    with db.read() as session:
        assert {(o.replica_id, o.error) for o in plans.observations(session, generation)} == {
            ("a", None),
            ("b", "no such artifact"),
        }


def test_a_rollback_needs_a_connection_and_no_session(db: Database, versions: list[int]) -> None:
    append(db, versions[0])
    start_canary(db, versions[0], versions[1])
    with contextlib.suppress(InterruptedError), transaction(db.url, "t") as ledger:
        plans.roll_back(ledger, actor="t", reason="t")
        raise InterruptedError
    with db.read() as session:
        assert plans.latest(session).generation == 2  # type: ignore[union-attr]
    with transaction(db.url, "t") as ledger:
        plan = plans.roll_back(ledger, actor="t", reason="t")
    with db.read() as session:
        assert plans.latest(session) == plan
    assert (plan.generation, plan.champion, plan.arms) == (3, versions[0], ())
