"""How a change reaches the engine: loaded before, switched at once, taken back without loading."""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest
from sqlalchemy import select, text

from engine.contracts import CANARY, CONTROL
from engine.ops import postgres
from engine.ops.system import answers
from engine.runner.engine import Output
from engine.store.models import TraceRow
from engine.store.repositories import audit, plans, replicas
from tests.server.conftest import Served, Start
from tests.server.driving import arms_of, memory_version, start_canary
from tests.waiting import until


def test_the_first_start_serves_prompt_lookup_with_plain_decoding_as_fallback(served: Served) -> None:
    with served.db.read() as session:
        plan = plans.latest(session)
    assert plan is not None
    assert (plan.generation, plan.actor) == (1, "engine")
    assert served.server.residency.resident == tuple(sorted({plan.champion, plan.fallback}))


def test_a_request_stays_on_the_policy_it_began_with(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan changes in the middle of a generation: same tokens as before, the next request gets the new one."""
    monkeypatch.setattr(served.server.engine.control, "costs", None)  # so that what is drafted follows from the policy
    held = threading.Event()
    body = {"max_tokens": 300, "ignore_eos": True, "temperature": 0.0, "headers": {"X-Traffic-Class": "chat"}}
    expected = served.completion(**body).json()["choices"][0]["text"]
    version = memory_version(served, expected)
    step, taken = served.server.engine.step, iter(range(1_000_000))

    def step_until_held() -> list[Output]:
        """Fifty steps, then no more until the plan has changed: the middle is a place, not a matter of luck."""
        if next(taken) >= 50 and not held.is_set():
            return []
        return step()

    monkeypatch.setattr(served.server.engine, "step", step_until_held)
    request = {"model": served.model, "prompt": "hello", "max_tokens": 300, "ignore_eos": True, "temperature": 0.0}
    with served.http.stream("POST", "/v1/completions", json=request | {"stream": True}) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        with served.db.write() as session:
            plan = plans.latest(session)
            assert plan is not None
            made = plans.append(session, champion=version, fallback=plan.fallback, actor="test", reason="swap")
        served.observes(made.generation)
        still_running = served.server.engine.stats()["running"]
        held.set()
        rest = [line for line in lines if line.startswith("data: {")]
    events = [json.loads(line.removeprefix("data: ")) for line in [first, *rest] if line.startswith("data: {")]
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    assert still_running == 1
    assert text == expected
    assert answer.headers["x-slipstream-policy-version"] == str(plan.champion)
    after = served.completion(**body)
    assert after.headers["x-slipstream-policy-version"] == str(version)
    assert after.json()["choices"][0]["text"] == expected
    served.traces(3)
    with served.db.read() as session:
        rows = list(session.scalars(select(TraceRow).order_by(TraceRow.started_at)))
    assert rows[1].drafted == rows[0].drafted != rows[2].drafted, "the policies draft differently, the output is one"


def test_canary_and_control_serve_and_a_rollback_loads_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    version = memory_version(served, "anything")
    served.observes(start_canary(served, version).generation)
    assert arms_of(served) == {CANARY, CONTROL}
    assert version in served.server.residency.resident

    def no_loading(*_: object) -> None:
        raise AssertionError("a rollback must not load")

    monkeypatch.setattr("engine.server.residency.load_proposer", no_loading)
    with served.db.write() as session:
        plan = plans.roll_back(session, actor="test", reason="bad")
    served.observes(plan.generation)
    assert arms_of(served) == {"champion"}


def test_a_replica_that_stops_in_order_is_not_waited_for(served: Served) -> None:
    served.server.subscriber.stop()
    with served.db.read() as session:
        assert replicas.live(session) == []


def test_without_notifications_the_poll_still_finds_a_plan(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise psycopg.OperationalError("too many connections")

    without_listen = SimpleNamespace(connect=refused, Error=psycopg.Error)
    monkeypatch.setattr("engine.server.subscriber.psycopg", without_listen)
    with served.db.write() as session:
        session.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'slipstream plans' AND datname = current_database()"
            )
        )
    served.observes(start_canary(served, memory_version(served, "anything")).generation)


def test_postgres_killed_under_load_loses_nothing(start: Start, postgres_home: Path) -> None:
    """SIGKILL to the server under load: every request is answered, every trace is stored once, rollups agree."""
    served = start()

    def ask(number: int) -> int:
        return served.completion(
            max_tokens=6, prompt=f"number {number}", headers={"x-request-id": f"r{number}"}
        ).status_code

    with ThreadPoolExecutor(4) as pool:
        before = list(pool.map(ask, range(30)))
        pid = postgres.postmaster_pid(postgres_home)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        during = list(pool.map(ask, range(30, 90)))
        until(lambda: served.server.writer.stats()["spill_files"] > 0, "batches are spilled")
        postgres.start(postgres_home)
        after = list(pool.map(ask, range(90, 120)))
    assert {*before, *during, *after} == {200}
    assert served.server.writer.flush(60)
    ids = [f"r{n}" for n in range(120)]
    with served.db.read() as session:
        assert audit.times_stored(session, ids) == dict.fromkeys(ids, 1)
        assert audit.rolled_up(session) == audit.traces(session) == 120


def test_a_start_without_the_database_serves_plainly(
    start: Start, database_url: str, target: object, tmp_path: Path
) -> None:
    from engine.server.main import EngineServer, ServerThread
    from tests.server.conftest import settings_for

    settings = settings_for(tmp_path, "postgresql://postgres@127.0.0.1:1/nothing")
    server = EngineServer(settings, target)  # type: ignore[arg-type]
    thread = ServerThread(server)
    thread.start()
    try:
        import httpx

        client = httpx.Client(base_url=server.url, timeout=30)

        until(answers(f"{server.url}/healthz"), "the server answers")
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert "no serving plan" in answer.text
        body = {"model": server.target.name, "prompt": "hello", "max_tokens": 4, "temperature": 0.0}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200
        assert answer.headers["x-slipstream-policy-version"] == "0"
        until(lambda: server.writer.stats()["spilled"] == 1, "its trace is on disk")
    finally:
        thread.stop()
