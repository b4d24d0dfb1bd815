"""Slices through HTTP: who may be tried, in which share, and always in the same arm."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from engine.contracts import CANARY, CHAMPION, CONTROL, Arm
from engine.ops import postgres
from engine.store.repositories import plans, replicas
from tests.server.conftest import Served, Start
from tests.server.driving import memory_version
from tests.waiting import until

KEYS = 60


def sliced(served: Served, weight: float = 0.5, **limits: list[str]) -> None:
    version = memory_version(served, "anything")
    with served.db.write() as session:
        now = plans.latest(session)
        assert now is not None
        made = plans.append(
            session,
            champion=now.champion,
            fallback=now.fallback,
            rollback_to=now.champion,
            arms=(Arm(CANARY, version, weight), Arm(CONTROL, now.champion, weight)),
            salt="t",
            actor="test",
            reason="test",
            **limits,  # type: ignore[arg-type]
        )
    served.observes(made.generation)


def arm(served: Served, key: int, headers: Mapping[str, str] = {}) -> str:
    answer = served.completion(max_tokens=1, headers={"X-Conversation-Id": f"k{key}", **headers})
    assert answer.status_code == 200
    return answer.headers["x-slipstream-arm"]


def arms(served: Served, headers: Mapping[str, str] = {}) -> list[str]:
    return [arm(served, key, headers) for key in range(KEYS)]


def test_a_percentage_sticks_to_its_keys(served: Served) -> None:
    sliced(served, 0.25)
    first = arms(served)
    assert {first.count(name) for name in (CANARY, CONTROL)} <= set(range(6, 27))  # 15 of 60 expected, p < 1e-3 outside
    assert arms(served) == first
    by_user = served.completion(max_tokens=1, user="k1").headers["x-slipstream-arm"]
    assert by_user == first[1], "a user is a key where no conversation is named"
    sliced(served, 0.5)
    assert all(now == before for now, before in zip(arms(served), first, strict=True) if before != CHAMPION)


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        ({"traffic_classes": ["code"]}, {"X-Traffic-Class": "code"}, {"X-Traffic-Class": "chat"}),
        ({"tenants": ["acme"]}, {"X-Tenant": "acme"}, {"X-Tenant": "other"}),
        ({"tenants": ["acme"]}, {"X-Tenant": "acme"}, {}),
        ({"slices": ["staff"]}, {"X-Slice": "staff"}, {"X-Slice": "guests"}),
        ({"slices": ["staff"]}, {"X-Slice": "staff"}, {}),
        (
            {"slices": ["staff"], "tenants": ["acme"]},
            {"X-Slice": "staff", "X-Tenant": "acme"},
            {"X-Slice": "staff", "X-Tenant": "other"},
        ),
    ],
)
def test_only_the_slice_is_tried(
    served: Served, limits: dict[str, list[str]], inside: Mapping[str, str], outside: Mapping[str, str]
) -> None:
    sliced(served, **limits)
    assert set(arms(served, outside)) == {CHAMPION}
    tried = arms(served, inside)
    assert set(tried) == {CANARY, CONTROL}
    assert arms(served, inside) == tried


def test_a_replica_says_when_it_gave_the_canary_a_request(served: Served) -> None:
    sliced(served, 0.5)
    with served.db.read() as session:
        plan = plans.latest(session)
    assert plan is not None
    asked = served.db.now()
    assert any(arm(served, key) == CANARY for key in range(KEYS))

    def said() -> dict[str, Any] | None:
        with served.db.read() as session:
            return replicas.live(session)[0].stats["canary_given"]

    until(lambda: said() is not None, "the heartbeat says so")
    given = said()
    assert given is not None
    assert given["generation"] == plan.generation
    assert asked <= datetime.fromisoformat(given["at"]) <= served.db.now()


def test_cut_off_from_postgres_the_canary_goes_home_after_the_lease(start: Start, postgres_home: Path) -> None:
    """SIGKILL to Postgres while a canary serves: requests are answered, and its keys go to the champion for good."""
    served = start("engine.plan_lease_s=3")
    sliced(served)
    assert CANARY in arms(served)
    pid = postgres.postmaster_pid(postgres_home)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    try:
        until(lambda: set(arms(served)) == {CHAMPION}, "every key is the champion's", tries=60, pause_s=0.1)
        assert served.server.residency.lease_expired
        assert set(arms(served)) == {CHAMPION}
    finally:
        postgres.start(postgres_home)
    until(lambda: CANARY in arms(served), "the ledger is heard again", tries=60, pause_s=0.1)
