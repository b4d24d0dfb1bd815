"""A replica serves what it can of a plan, at once, and nothing that was taken back."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from engine.contracts import CANARY, CONTROL, ProposerKind
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import publish
from engine.server import residency as residency_module
from engine.speculation.artifact import build_artifact
from engine.speculation.memory import MEMORY_FILE
from engine.speculation.proposer import Proposer
from engine.store.database import Database
from engine.store.repositories import plans, policies
from tests.server.conftest import Served, Start
from tests.server.driving import arms_of, memory_version, start_canary
from tests.waiting import until


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
    before = residency.plan
    stale = replace(before, generation=0, champion=before.fallback)  # resident: it could be served at once
    assert residency.follow(stale, lambda _: None) is None
    assert residency.plan == before


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


def test_a_replica_that_comes_back_serves_nothing_that_was_taken_back(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off for longer than its lease; the plan of now names another canary, which takes its time to be read."""
    first = memory_version(served, "anything")
    served.observes(start_canary(served, first).generation)
    subscriber, residency = served.server.subscriber, served.server.residency
    look, real = subscriber.look, residency._clock
    monkeypatch.setattr(subscriber, "look", lambda: None)
    residency._clock = lambda: real() + 61.0
    assert residency.lease_expired
    release, load = threading.Event(), residency_module.load_proposer

    def slow(*args: object) -> Proposer:
        assert release.wait(60)
        return load(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(residency_module, "load_proposer", slow)
    plan = start_canary(served, memory_version(served, "something else"))
    look()
    assert residency.is_reading
    assert not residency.lease_expired
    assert arms_of(served) == {"champion"}
    release.set()
    monkeypatch.undo()
    served.observes(plan.generation)


def test_a_policy_that_the_engine_does_not_take_takes_nothing_away_but_itself(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, real = memory_version(served, "anything"), served.server.engine.load

    def load(number: int, proposer: Proposer) -> None:
        if number == version:
            raise MemoryError("no room for its cache")
        real(number, proposer)

    monkeypatch.setattr(served.server.engine, "load", load)
    plan = start_canary(served, version)
    until(lambda: served.server.residency.plan == plan, "the plan is in force without it")
    assert arms_of(served) == {"champion"}
    assert "no room for its cache" in served.http.get("/readyz").text


def test_a_policy_that_is_read_for_ever_is_stood_in_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(residency_module, "load_proposer", lambda *_: release.wait(60))
    monkeypatch.setattr(residency_module, "READ_PATIENCE_S", 0.0)
    with served.db.write() as session:
        now = plans.latest(session)
        assert now is not None
        champion = memory_version(served, "anything")
        plan = plans.append(session, champion=champion, fallback=now.fallback, actor="test", reason="a slow disk")
    until(lambda: served.server.residency.plan == plan, "the plan is in force without it")
    assert served.completion().headers["x-slipstream-policy-version"] == str(now.fallback)
    assert "still being read" in served.http.get("/readyz").text
    release.set()
