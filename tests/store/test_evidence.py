"""The evidence query against sums made by hand."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from sqlalchemy import select, text, update

from engine.contracts import CANARY, CONTROL, Arm
from engine.store import histogram
from engine.store.database import Database
from engine.store.models import TraceRow
from engine.store.repositories import compared, evidence, leases, plans
from engine.store.repositories.compared import Window
from engine.store.segments import Segment
from tests.rollout import database_world as world

NOW = datetime.now(UTC)
LATER = NOW + timedelta(hours=1)
TOOK = timedelta(seconds=1)
"""What each request took; it is written when it ends."""
BEGAN = NOW - 4 * TOOK


def counted(db: Database, *windows: Window, limit: int = compared.LIMIT, now: datetime = LATER) -> list[Segment]:
    """All that was served, counted from the start in pieces of ``limit``."""
    with db.write() as session:
        compared.forget(session, None)
    if windows:
        for _ in range(1_000):
            with db.write() as session:
                if compared.take_in(session, windows, now, limit) is None:
                    break
    with db.read() as session:
        return evidence.segments(session, windows)


@pytest.fixture
def served(db: Database) -> Database:
    """Two hundred requests of two classes under a plan with a canary."""
    one, two = world.versions(db, 2)
    with db.write() as session:
        arms = (Arm(CANARY, two, 0.4), Arm(CONTROL, one, 0.4))
        plans.append(session, champion=one, fallback=one, arms=arms, actor="t", reason="t")
    rng = np.random.default_rng(0)
    for name in ("chat", "code"):
        world.serve(db, rng, NOW, 100, {one: 1.0, two: 1.5}, {two: 0.3}, name)
    return db


def test_moments_and_counts_are_those_of_the_rows(served: Database) -> None:
    with served.read() as session:
        found = counted(served, Window(1, NOW, BEGAN))
        rows = session.scalars(select(TraceRow)).all()
    assert {(s.arm, s.traffic_class) for s in found} == {
        (a, c) for a in (CANARY, CONTROL) for c in (None, "chat", "code")
    }
    for s in found:
        mine = [r for r in rows if r.arm == s.arm and s.traffic_class in (None, r.traffic_class)]
        x = [(r.steps + r.accepted) / r.steps for r in mine]
        assert (s.requests, s.stage_requests, s.n) == (len(mine), len(mine), len(mine))
        assert (s.y, s.yy) == (len(mine), len(mine))
        assert (s.x, s.xy, s.xx) == pytest.approx((sum(x), sum(x), sum(v * v for v in x)))
        assert s.error_keys == sum(r.status == "error" for r in mine)
        assert s.keys == len({r.assignment_key for r in mine})
        fine = [r.e2e_s for r in mine if r.status == "ok"]
        assert dict(zip(*s.latencies["e2e"], strict=True)) == dict(zip(*histogram.count(fine), strict=True))
        cost = [r.cost_s / (r.steps + r.accepted) for r in mine if r.status == "ok"]
        assert dict(zip(*s.latencies["cost"], strict=True)) == dict(zip(*histogram.count(cost), strict=True))


def test_a_retrying_client_is_one_key_and_one_error(served: Database) -> None:
    with served.write() as session:
        session.execute(
            update(TraceRow).where(TraceRow.arm == CANARY).values(assignment_key="one", status="error", retry=3)
        )
    with served.read() as session:
        canary = next(s for s in counted(served, Window(1, NOW, BEGAN)) if s.arm == CANARY)
        assert canary.traffic_class is None
    assert (canary.keys, canary.error_keys) == (1, 1)
    assert (canary.retry_keys, canary.timeout_keys) == (1, 0)
    assert canary.requests > 10


def test_a_draft_that_failed_is_an_error_of_a_request_that_ended_well(served: Database) -> None:
    with served.write() as session:
        session.execute(update(TraceRow).values(status="ok"))
        session.execute(update(TraceRow).where(TraceRow.arm == CANARY).values(draft_errors=3))
    with served.read() as session:
        found = {s.arm: s for s in counted(served, Window(1, NOW, BEGAN)) if s.traffic_class is None}
        past = evidence.past(session, 2, NOW)
    canary, control = found[CANARY], found[CONTROL]
    assert canary.error_keys == canary.draft_error_keys == canary.keys > 0
    assert control.error_keys == control.draft_error_keys == 0
    assert {request.draft_errors for request in past.requests} == {3}


def test_a_key_of_two_classes_counts_once_over_all(served: Database) -> None:
    with served.write() as session:
        session.execute(update(TraceRow).where(TraceRow.arm == CANARY).values(assignment_key="one"))
    with served.read() as session:
        found = {s.traffic_class: s for s in counted(served, Window(1, NOW, BEGAN)) if s.arm == CANARY}
    assert {name: s.error_keys for name, s in found.items()} == {None: 1, "chat": 1, "code": 1}
    assert found[None].keys == 1


def test_what_is_squared_are_the_tokens_per_step_of_a_key(served: Database) -> None:
    """Five keys per arm, each with requests of both classes, some of which took no verify step."""
    with served.write() as session:
        session.execute(text("UPDATE traces SET assignment_key = 'k' || get_byte(uuid_send(trace_id), 0) % 5"))
        session.execute(
            text("UPDATE traces SET steps = 0, accepted = 0 WHERE assignment_key = 'k0' AND arm = 'control'")
        )
    with served.read() as session:
        found = counted(served, Window(1, NOW, BEGAN))
        rows = session.scalars(select(TraceRow)).all()
    for s in found:
        x, y = defaultdict(int), defaultdict(int)  # type: dict[str, int], dict[str, int]
        for r in rows:
            if r.arm == s.arm and s.traffic_class in (None, r.traffic_class) and r.steps:
                x[r.assignment_key] += r.steps + r.accepted
                y[r.assignment_key] += r.steps
        assert (s.keys, s.n) == (5, 4 if s.arm == CONTROL else 5)
        per_step = [x[k] / y[k] for k in x]
        assert (s.y, s.yy) == (len(y), len(y))
        assert (s.x, s.xy, s.xx) == pytest.approx((sum(per_step), sum(per_step), sum(v * v for v in per_step)))


@pytest.mark.parametrize("since", [0.0, 20.0, 59.0, 60.0, 61.5, 200.0])
def test_histograms_count_each_request_once_wherever_the_warm_up_ends(db: Database, since: float) -> None:
    one, two = world.versions(db, 2)
    with db.write() as session:
        arms = (Arm(CANARY, two, 0.4), Arm(CONTROL, one, 0.4))
        plans.append(session, champion=one, fallback=one, arms=arms, actor="t", reason="t")
    rng, began = np.random.default_rng(1), NOW.replace(second=0, microsecond=0)
    for second in range(0, 240, 7):
        world.serve(db, rng, began + timedelta(seconds=second), 10, {one: 1.0, two: 1.5})
    cut = began + timedelta(seconds=since)
    with db.read() as session:
        found = counted(db, Window(1, began, cut))
        rows = session.scalars(select(TraceRow).where(TraceRow.written_at - TOOK >= cut)).all()
    for s in found:
        mine = [r for r in rows if r.arm == s.arm and s.traffic_class in (None, r.traffic_class)]
        for metric in ("e2e", "ttft", "tpot"):
            expected = histogram.count(getattr(r, f"{metric}_s") for r in mine)
            assert tuple(map(list, s.latencies[metric])) == expected


@pytest.mark.parametrize("keys", [1, 5, 40])
def test_a_key_weighs_one_however_many_requests_it_brought(served: Database, keys: int) -> None:
    """In each class, and over all classes; latencies differ within a key."""
    with served.write() as session:
        session.execute(
            text("UPDATE traces SET assignment_key = 'k' || get_byte(uuid_send(trace_id), 0) % :keys"), {"keys": keys}
        )
        session.execute(text("UPDATE traces SET e2e_s = 0.5 + get_byte(uuid_send(trace_id), 1) / 100.0"))
        session.execute(text("UPDATE traces SET tpot_s = NULL WHERE get_byte(uuid_send(trace_id), 2) % 3 = 0"))
    with served.read() as session:
        found = counted(served, Window(1, NOW, BEGAN))
        rows = session.scalars(select(TraceRow).where(TraceRow.status == "ok")).all()
    for s in found:
        mine = [r for r in rows if r.arm == s.arm and s.traffic_class in (None, r.traffic_class)]
        for metric in ("e2e", "tpot"):
            known = [(r.assignment_key, v) for r in mine if (v := getattr(r, f"{metric}_s")) is not None]
            times, weights = Counter(key for key, _ in known), defaultdict[int, float](float)
            for key, value in known:
                weights[histogram.bucket(value)] += 1 / times[key]
            indices, counts = s.latencies[metric]
            assert dict(zip(indices, counts, strict=True)) == pytest.approx(weights, abs=1e-3)
            assert sum(counts) == pytest.approx(len(times), abs=0.05)


def test_warm_up_and_other_generations_do_not_count(served: Database) -> None:
    later = NOW - TOOK + timedelta(milliseconds=50)
    with served.read() as session:
        whole = counted(served, Window(1, NOW, BEGAN))
        warm = counted(served, Window(1, NOW, later))
        assert 0 < sum(s.requests for s in warm) < sum(s.requests for s in whole)
        assert counted(served, Window(2, NOW, BEGAN)) == []
        assert counted(served) == []
        assert evidence.newest(session, Window(2, NOW, BEGAN)) == {"canary": None, "control": None}
        assert None not in evidence.newest(session, Window(1, NOW, BEGAN)).values()


@pytest.mark.parametrize("limit", [1, 7, 50])
def test_counting_in_pieces_gives_what_counting_at_once_gives(served: Database, limit: int) -> None:
    """Keys of many requests in both classes, which come back piece after piece."""
    with served.write() as session:
        session.execute(text("UPDATE traces SET assignment_key = 'k' || get_byte(uuid_send(trace_id), 0) % 9"))
        session.execute(text("UPDATE traces SET e2e_s = 0.5 + get_byte(uuid_send(trace_id), 1) / 100.0"))
    at_once, in_pieces = counted(served, Window(1, NOW, BEGAN)), counted(served, Window(1, NOW, BEGAN), limit=limit)
    assert [replace(s, latencies={}) for s in in_pieces] == [replace(s, latencies={}) for s in at_once]
    for one, other in zip(in_pieces, at_once, strict=True):
        for metric in ("e2e", "ttft", "tpot"):
            assert one.latencies[metric][0] == other.latencies[metric][0]
            assert one.latencies[metric][1] == pytest.approx(other.latencies[metric][1], abs=2e-4)


def test_what_was_counted_is_never_read_again(served: Database) -> None:
    """So a tick costs what came since the last one, however much came before."""
    window = Window(1, NOW, BEGAN)
    before = counted(served, window, now=NOW + timedelta(milliseconds=900))
    with served.write() as session:
        session.execute(text("DELETE FROM traces"))
    world.serve(served, np.random.default_rng(1), NOW + timedelta(seconds=1), 40, {1: 1.0, 2: 1.5}, traffic_class="new")
    with served.write() as session:
        assert compared.take_in(session, [window], LATER) is None
    with served.read() as session:
        after = evidence.segments(session, [window])
        fresh = session.scalars(select(TraceRow)).all()
    assert {s.traffic_class for s in after} == {None, "chat", "code", "new"}
    for arm in (CANARY, CONTROL):
        whole, then = (next(s for s in found if s.arm == arm) for found in (after, before))
        assert whole.requests == then.requests + sum(t.arm == arm for t in fresh)


def test_a_new_stage_goes_on_from_the_one_before_and_stage_requests_are_its_own(served: Database) -> None:
    first, second = Window(1, NOW, BEGAN), Window(2, NOW, BEGAN)
    before = {s.arm: s for s in counted(served, first) if s.traffic_class is None}
    world.serve(served, np.random.default_rng(1), NOW + timedelta(seconds=1), 60, {1: 1.0, 2: 1.5})
    with served.write() as session:
        session.execute(
            text("UPDATE traces SET generation = 2 WHERE started_at >= :at"), {"at": NOW + timedelta(seconds=1)}
        )
        compared.take_in(session, [first, second], LATER)
    with served.read() as session:
        found = [s for s in evidence.segments(session, [first, second]) if s.traffic_class is None]
    for s in found:
        assert 0 < s.stage_requests == s.requests - before[s.arm].requests


@pytest.mark.parametrize("waits", [True, False])
def test_a_trace_that_is_committed_late_is_counted(
    served: Database, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """A younger one is there before it. The planted fault passes the older one over for ever."""
    if not waits:
        monkeypatch.setattr(compared, "settled_before", lambda session, now: now)
    window = Window(1, NOW, BEGAN)
    total = sum(s.requests for s in counted(served, window, now=served.now())[::3])
    with served.read() as session:
        late, early = session.scalars(select(TraceRow.trace_id).where(TraceRow.arm == "champion").limit(2)).all()
    serving = "UPDATE traces SET arm = 'canary', written_at = clock_timestamp() WHERE trace_id = :id"
    with served.write() as slow:
        slow.execute(text(serving), {"id": late})
        with served.write() as quick:
            quick.execute(text(serving), {"id": early})
        with served.write() as session:
            compared.take_in(session, [window], served.now())
    with served.write() as session:
        compared.take_in(session, [window], served.now())
    with served.read() as session:
        found = sum(s.requests for s in evidence.segments(session, [window])[::3])
    assert found - total == (2 if waits else 1)


def test_a_transaction_that_stays_open_is_said_to_keep_the_counts_back(served: Database) -> None:
    with served.write() as slow, served.write() as session:
        slow.execute(text("UPDATE traces SET retry = 1 WHERE false"))
        slow.execute(text("SELECT pg_current_xact_id()"))
        reached = compared.take_in(session, [Window(1, NOW, BEGAN)], served.now() + timedelta(minutes=5))
    assert reached is not None
    assert reached < served.now()


def test_counts_of_rollouts_that_are_over_are_forgotten_in_bites(served: Database) -> None:
    counted(served, Window(1, NOW, BEGAN))
    left = []
    with served.read() as session:
        for _ in range(3):
            with served.write() as writing:
                compared.forget(writing, 2, 40)
            left.append(session.scalar(text("SELECT count(*) FROM compared_keys")))
    assert left[0] - left[1] == left[1] - left[2] == 40


def test_the_observed_share_is_the_canarys(served: Database) -> None:
    with served.read() as session:
        share = evidence.observed_share(session, Window(1, NOW, BEGAN))
        assert share == pytest.approx(0.4, abs=0.12)
        assert evidence.observed_share(session, Window(1, NOW, BEGAN), {"batch"}) is None


def test_a_lease_changes_hands_only_when_it_has_ended_and_its_token_grows(db: Database) -> None:
    def take(holder: str, seconds: float) -> int | None:
        with db.write() as session:
            return leases.acquire(session, "test", holder, NOW + timedelta(seconds=seconds), 10.0)

    assert take("a", 0) == 1
    assert take("a", 5) == 1
    assert take("b", 14) is None
    assert take("b", 15) == 2
    assert take("a", 16) is None
    with db.write() as session, pytest.raises(leases.LeaseLost, match="held by b with token 2"):
        leases.check(session, "test", "a", 1)
    with db.write() as session:
        leases.release(session, "test", "b", NOW + timedelta(seconds=17))
    assert take("a", 17) == 3
