"""How a change reaches the engine: loaded before, switched at once, taken back without loading."""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from engine.contracts import CANARY, CONTROL, Arm, ProposerKind, ServingPlan
from engine.ops import postgres
from engine.ops.system import answers
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import publish
from engine.runner.engine import Output
from engine.server import residency as residency_module
from engine.speculation.artifact import build_artifact
from engine.speculation.memory import MEMORY_FILE, TraceMemoryBuilder
from engine.speculation.proposer import Proposer
from engine.store.database import Database
from engine.store.models import TraceRow
from engine.store.repositories import audit, plans, policies, replicas
from tests.server.conftest import Served, Start
from tests.waiting import until


def memory_version(served: Served, text: str) -> int:
    """A trace memory that has seen ``text``, published like any other."""
    target = served.server.target
    builder = TraceMemoryBuilder()
    builder.add("chat", target.tokenizer.encode("hello"), target.tokenizer.encode(text))
    files = build_artifact(
        ProposerKind.TRACE_MEMORY,
        3,
        files={MEMORY_FILE: builder.build(10**6)},
        target_fingerprint=target.fingerprint,
        tokenizer_fingerprint=target.tokenizer_fingerprint,
    )
    store = ArtifactStore(served.server.settings.dir("policies"))
    return publish(served.db, store, files).version


def start_canary(served: Served, version: int, weight: float = 0.5) -> ServingPlan:
    with served.db.write() as session:
        now = plans.latest(session)
        assert now is not None
        arms = (Arm(CANARY, version, weight), Arm(CONTROL, now.champion, weight))
        return plans.append(
            session,
            champion=now.champion,
            fallback=now.fallback,
            rollback_to=now.champion,
            arms=arms,
            salt="t",
            actor="test",
            reason="test",
        )


def arms_of(served: Served, n: int = 40) -> set[str]:
    answers = [served.completion(max_tokens=1, headers={"X-Conversation-Id": str(key)}) for key in range(n)]
    return {answer.headers["x-slipstream-arm"] for answer in answers}


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


def test_a_canary_that_cannot_be_loaded_leaves_its_requests_to_the_champion(served: Served) -> None:
    version = memory_version(served, "anything")
    store = ArtifactStore(served.server.settings.dir("policies"))
    with served.db.read() as session:
        found = policies.get(session, version)
    assert found is not None
    (store.path(found.digest) / MEMORY_FILE).write_bytes(b"tampered with")
    plan = start_canary(served, version)

    def failed() -> bool:
        with served.db.read() as session:
            return any(o.error is not None for o in plans.observations(session, plan.generation))

    until(failed, "the failure is on record")
    with served.db.read() as session:
        error = plans.observations(session, plan.generation)[0].error
    assert error is not None
    assert "digest" in error
    assert arms_of(served, 10) == {"champion"}
    assert served.server.residency.plan == plan
    assert f"without v{version}" in served.http.get("/readyz").text


def test_a_champion_that_cannot_be_loaded_is_stood_in_for_and_tried_again(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fallback serves until the files are there; then the champion, without a new plan."""
    monkeypatch.setattr("engine.server.residency.FAILED_RETRY_S", 0.0)
    files = build_artifact(ProposerKind.NGRAM, 3)
    champion = publish(served.db, ArtifactStore(tmp_path / "elsewhere"), files).version
    with served.db.write() as session:
        before = plans.latest(session)
        assert before is not None
        plans.append(session, champion=champion, fallback=before.fallback, actor="test", reason="files are elsewhere")

    def serves(version: int) -> bool:
        return served.completion(max_tokens=1).headers["x-slipstream-policy-version"] == str(version)

    until(lambda: serves(before.fallback), "the fallback stands in")
    assert served.completion().status_code == 200
    ArtifactStore(served.server.settings.dir("policies")).put(files)
    until(lambda: serves(champion), "the champion serves")
    assert served.http.get("/readyz").text == "ready\n"


def test_a_canary_that_loads_slowly_does_not_delay_its_own_rollback(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, real = threading.Event(), residency_module.load_proposer

    def slow(*args: object) -> Proposer:
        assert release.wait(60)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(residency_module, "load_proposer", slow)
    start_canary(served, memory_version(served, "anything"))
    until(lambda: served.server.residency.is_reading, "the canary is being read")
    with served.db.write() as session:
        plan = plans.roll_back(session, actor="test", reason="never mind")
    served.observes(plan.generation)
    release.set()
    assert arms_of(served, 10) == {"champion"}


def test_a_first_plan_that_cannot_be_loaded_is_served_plainly(start: Start, db: Database, tmp_path: Path) -> None:
    """The version is known, its files are not here: plain decoding until they are."""
    elsewhere = publish(db, ArtifactStore(tmp_path / "elsewhere"), build_artifact(ProposerKind.NGRAM, 3)).version
    with db.write() as session:
        plans.append(session, champion=elsewhere, fallback=elsewhere, actor="test", reason="files are elsewhere")
    served = start(ready=False)
    until(lambda: f"without v{elsewhere}" in served.http.get("/readyz").text, "readiness says why")
    answer = served.completion()
    assert (answer.status_code, answer.headers["x-slipstream-policy-version"]) == (200, "0")


def test_an_older_generation_is_refused(served: Served) -> None:
    residency = served.server.residency
    assert residency.plan is not None
    assert residency.follow(replace(residency.plan, generation=0, champion=99), lambda _: None) is None
    assert residency.plan.champion != 99


def test_a_replica_that_stops_in_order_is_not_waited_for(served: Served) -> None:
    served.server.subscriber.stop()
    with served.db.read() as session:
        assert replicas.live(session) == []


def test_without_the_ledger_for_a_lease_the_canary_stops(served: Served) -> None:
    version = memory_version(served, "anything")
    served.observes(start_canary(served, version).generation)
    residency = served.server.residency
    served.server.subscriber.stop()
    real = residency._clock
    assert arms_of(served) == {CANARY, CONTROL}
    residency._clock = lambda: real() + 61.0
    assert residency.lease_expired
    assert arms_of(served) == {"champion"}


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
