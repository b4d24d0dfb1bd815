"""MLflow mirrors Postgres: against a real MLflow with a database of its own, and against one that is down."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from uuid import uuid4

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from engine.contracts import CANARY, Arm, ProposerKind, SlipstreamError
from engine.registry import mlflow_registry
from engine.registry.artifacts import ArtifactStore
from engine.registry.mlflow_registry import MODEL, MlflowRegistry
from engine.registry.publish import ensure_version, publish
from engine.speculation.artifact import build_artifact
from engine.store.database import Database
from engine.store.members import Members
from engine.store.repositories import export, learning, plans, policies
from engine.store.repositories.learning import Attempt
from engine.store.repositories.policies import Lineage
from tests.registry.conftest import NewMlflow
from tests.rollout.database_world import take_in

NOW = datetime.now(UTC)
GATE = {
    "passed": True,
    "overall": {"n": 20, "champion": 1.5, "candidate": 1.8, "delta": 0.3, "low": 0.2, "high": 0.4},
    "classes": {"long form!": {"n": 20, "champion": 1.5, "candidate": 1.8, "delta": 0.3, "low": 0.2, "high": 0.4}},
    "speedup": 1.4,
}


@pytest.fixture(scope="module")
def tracking_uri(new_mlflow: NewMlflow, tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_mlflow(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


@pytest.fixture
def registry(tracking_uri: str, tmp_path: Path) -> Iterator[MlflowRegistry]:
    """An experiment of its own; the registered model is emptied afterwards."""
    connected = mlflow_registry.connect(tracking_uri, f"test-{uuid4().hex}")
    connected.client.create_experiment(connected.experiment, artifact_location=(tmp_path / "artifacts").as_uri())
    yield connected
    connected.client.delete_registered_model(MODEL)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "policies")


@pytest.fixture
def learned(db: Database, store: ArtifactStore) -> int:
    """none, ngram, and one version that an attempt made; one attempt that was refused."""
    none = ensure_version(db, store, build_artifact(ProposerKind.NONE, 0))
    ngram = ensure_version(db, store, build_artifact(ProposerKind.NGRAM, 4))
    take_in(db, [uuid4(), uuid4()], NOW)
    lineage = [Lineage("train", Members.of([1, 2]), NOW, NOW, {"chat": 2})]
    made = publish(db, store, build_artifact(ProposerKind.NGRAM, 3), parent=ngram.version, gate=GATE, lineage=lineage)
    with db.write() as session:
        learning.record(session, Attempt(NOW, NOW, "refused", "no certain gain", 60, 20, {}, 0.1, None, ngram.version))
        learning.record(
            session, Attempt(NOW, NOW, "registered", "good", 60, 20, GATE, 0.2, made.version, ngram.version)
        )
        plans.append(session, champion=ngram.version, fallback=none.version, actor="t", reason="t")
    return made.version


def test_versions_attempts_and_aliases_are_mirrored_once(
    db: Database, store: ArtifactStore, registry: MlflowRegistry, learned: int
) -> None:
    assert registry.sync(db, store) == 5
    assert registry.sync(db, store) == 0
    with db.read() as session:
        versions = policies.all_versions(session)
        attempts = learning.attempts(session)
    assert all(v.mlflow_version and v.mlflow_run_id for v in versions)
    assert all(a.mlflow_run_id for a in attempts)
    registered = registry.client.search_model_versions(f"name = '{MODEL}'")
    assert {m.tags["slipstream.digest"] for m in registered} == {v.digest for v in versions}
    assert alias_versions(registry) == {"champion": learned - 1}
    run = registry.client.get_run(attempts[0].mlflow_run_id or "")
    assert run.data.metrics["gate/all/delta"] == 0.3
    assert run.data.metrics["gate/long_form_/low"] == 0.2
    assert run.info.status == "FINISHED"
    assert [d.dataset.name for d in run.inputs.dataset_inputs] == ["traces-train"]
    made = next(v for v in versions if v.version == learned)
    assert made.mlflow_run_id == attempts[0].mlflow_run_id
    assert registry.client.get_run(attempts[1].mlflow_run_id or "").data.tags["slipstream.reason"] == "no certain gain"


def test_the_artifact_in_mlflow_is_the_artifact(
    db: Database, store: ArtifactStore, registry: MlflowRegistry, learned: int, tmp_path: Path
) -> None:
    registry.sync(db, store)
    with db.read() as session:
        made = policies.get(session, learned)
    assert made is not None
    folder = Path(registry.client.download_artifacts(made.mlflow_run_id or "", "policy", str(tmp_path)))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == store.files(made.digest)


def test_a_crash_before_postgres_heard_of_it_registers_nothing_twice(
    db: Database, store: ArtifactStore, registry: MlflowRegistry, learned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*args: object) -> None:
        raise KeyboardInterrupt

    for name, module in (("set_run", learning), ("set_mlflow", policies)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, crash)
            with pytest.raises(KeyboardInterrupt):
                registry.sync(db, store)
    registry.sync(db, store)
    assert len(registry.client.search_model_versions(f"name = '{MODEL}'")) == 3
    experiment = registry.client.get_experiment_by_name(registry.experiment)
    assert experiment is not None
    assert len(registry.client.search_runs([experiment.experiment_id])) == 4  # two attempts, none, ngram


def test_aliases_follow_the_ledger_and_are_repaired(
    db: Database, store: ArtifactStore, registry: MlflowRegistry, learned: int
) -> None:
    registry.sync(db, store)
    none, ngram = learned - 2, learned - 1
    with db.write() as session:
        plans.append(session, champion=ngram, fallback=none, arms=(Arm(CANARY, learned, 0.5),), actor="t", reason="t")
    registry.sync(db, store)
    assert alias_versions(registry) == {"champion": ngram, "canary": learned}
    registry.client.set_registered_model_alias(MODEL, "champion", alias_number(registry, learned))
    registry.sync(db, store)
    assert alias_versions(registry) == {"champion": ngram, "canary": learned}
    with db.write() as session:
        plans.append(session, champion=learned, fallback=none, actor="t", reason="promoted")
    registry.sync(db, store)
    assert alias_versions(registry) == {"champion": learned, "previous": ngram}


def test_a_version_whose_files_are_lost_does_not_stop_the_others(
    db: Database, store: ArtifactStore, registry: MlflowRegistry, learned: int
) -> None:
    with db.read() as session:
        first = policies.get(session, learned - 2)
    assert first is not None
    (store.path(first.digest) / "manifest.json").unlink()
    registry.sync(db, store)
    assert len(registry.client.search_model_versions(f"name = '{MODEL}'")) == 2
    assert alias_versions(registry) == {"champion": learned - 1}


def test_an_alias_whose_version_mlflow_lacks_stays_where_it_is(
    db: Database, store: ArtifactStore, registry: MlflowRegistry, learned: int
) -> None:
    registry.sync(db, store)
    made = publish(db, store, build_artifact(ProposerKind.NGRAM, 7))
    with db.write() as session:
        plans.append(session, champion=made.version, fallback=learned - 2, actor="t", reason="t")
    shutil.rmtree(store.path(made.digest))
    registry.sync(db, store)
    assert alias_versions(registry)["champion"] == learned - 1
    store.put(build_artifact(ProposerKind.NGRAM, 7))
    registry.sync(db, store)
    assert alias_versions(registry)["champion"] == made.version


def test_an_attempt_that_mlflow_refuses_keeps_no_other_from_being_shown(
    db: Database, store: ArtifactStore, registry: MlflowRegistry, learned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = registry._log

    def refuses(run_id: str, attempt: Attempt, at_ms: int) -> None:
        if attempt.outcome == "refused":
            raise MlflowException("not like this", INVALID_PARAMETER_VALUE)
        log(run_id, attempt, at_ms)

    monkeypatch.setattr(registry, "_log", refuses)
    assert registry.sync(db, store) == 4
    assert registry.sync(db, store) == 0  # it is not offered again and again
    with db.read() as session:
        (left,) = learning.without_run(session)
    assert left.outcome == "refused"


def test_a_trouble_that_may_pass_is_no_refusal(
    db: Database, store: ArtifactStore, registry: MlflowRegistry, learned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_log", Mock(side_effect=MlflowException("overloaded")))
        with pytest.raises(SlipstreamError, match=r"attempt \d+: overloaded"):
            registry.sync(db, store)
    assert alias_versions(registry) == {"champion": learned - 1}  # the others did not wait
    assert registry.sync(db, store) == 3
    with db.read() as session:
        assert export.cursor(session, mlflow_registry.CURSOR).error is None


def test_an_mlflow_that_dies_meanwhile_is_not_asked_for_everything(
    db: Database, store: ArtifactStore, registry: MlflowRegistry, learned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question would wait for its time limit. What met trouble comes last when it is up again."""
    asked = []

    def dies(*given: Any) -> None:
        asked.append(given[-1])
        raise MlflowException("no answer within 30 s")

    with monkeypatch.context() as patch:
        for name in ("_mirror", "_register"):
            patch.setattr(registry, name, dies)
        patch.setattr(registry, "_point", lambda db: None)
        with pytest.raises(SlipstreamError, match="no answer"):
            registry.sync(db, store)
        assert len(asked) == mlflow_registry.ENOUGH == 3
        with pytest.raises(SlipstreamError, match="no answer"):
            registry.sync(db, store)
        assert not any(one in asked[:3] for one in asked[3:5])
    assert registry.sync(db, store) == 5


def test_what_an_mlflow_refused_that_is_no_more_is_offered_to_the_new_one(
    db: Database, store: ArtifactStore, registry: MlflowRegistry, learned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_log", Mock(side_effect=MlflowException("no", INVALID_PARAMETER_VALUE)))
        assert registry.sync(db, store) == 3
    registry.client.delete_registered_model(MODEL)
    assert registry.sync(db, store) == 5


def test_a_version_that_mlflow_refuses_keeps_no_other_and_no_alias_waiting(
    db: Database, store: ArtifactStore, registry: MlflowRegistry, learned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = registry.client.create_model_version

    def refuses(*given: Any, tags: dict[str, str], **named: Any) -> Any:
        if tags["slipstream.version"] == str(learned - 2):
            raise MlflowException("no such source", INVALID_PARAMETER_VALUE)
        return create(*given, tags=tags, **named)

    monkeypatch.setattr(registry.client, "create_model_version", refuses)
    assert registry.sync(db, store) == 4
    assert alias_versions(registry) == {"champion": learned - 1}
    assert registry.sync(db, store) == 0  # it is not offered again and again
    with db.read() as session:
        said = export.cursor(session, mlflow_registry.CURSOR)
    assert said.exported == 4
    assert said.refused == 1
    assert said.error == f"version {learned - 2}: no such source"


def test_a_version_whose_attempt_is_refused_gets_a_run_of_its_own(
    db: Database, store: ArtifactStore, registry: MlflowRegistry, learned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_log", Mock(side_effect=MlflowException("not like this", INVALID_PARAMETER_VALUE)))
    assert registry.sync(db, store) == 3
    assert len(registry.client.search_model_versions(f"name = '{MODEL}'")) == 3


def test_an_experiment_that_was_deleted_is_restored(
    db: Database, store: ArtifactStore, registry: MlflowRegistry, learned: int
) -> None:
    experiment = registry.client.get_experiment_by_name(registry.experiment)
    assert experiment is not None
    registry.client.delete_experiment(experiment.experiment_id)
    assert registry.sync(db, store) == 5
    assert alias_versions(registry) == {"champion": learned - 1}


def test_a_new_mlflow_is_shown_everything(
    db: Database, store: ArtifactStore, registry: MlflowRegistry, learned: int, tmp_path: Path, new_mlflow: NewMlflow
) -> None:
    """Its database was lost, and Postgres says that it has it all."""
    registry.sync(db, store)
    fresh = mlflow_registry.connect(new_mlflow(tmp_path / "new.db"), "again")
    fresh.client.create_experiment("again", artifact_location=(tmp_path / "again").as_uri())
    assert fresh.sync(db, store) == 5
    assert alias_versions(fresh) == {"champion": learned - 1}
    assert fresh.sync(db, store) == 0


def test_mlflow_down_fails_the_chore_and_nothing_else(
    db: Database, store: ArtifactStore, learned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    down = mlflow_registry.connect("http://127.0.0.1:9", "slipstream")
    with pytest.raises(Exception, match=r"127\.0\.0\.1"):
        down.sync(db, store)
    with db.read() as session:
        assert policies.get(session, learned) is not None


def alias_versions(registry: MlflowRegistry) -> dict[str, int]:
    """Alias → policy version, by the tag of the model version it points to."""
    found = registry.client.get_registered_model(MODEL).aliases
    return {
        alias: int(registry.client.get_model_version(MODEL, str(number)).tags["slipstream.version"])
        for alias, number in found.items()
    }


def alias_number(registry: MlflowRegistry, version: int) -> str:
    """The model version in MLflow of a policy version."""
    found = registry.client.search_model_versions(f"name = '{MODEL}' and tags.`slipstream.version` = '{version}'")
    return str(found[0].version)
