"""Every window of every serving version is a point on its run, once, whatever MLflow does meanwhile."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from engine.contracts import ProposerKind, SlipstreamError
from engine.registry import mlflow_registry, serving_metrics
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import ensure_version
from engine.registry.serving_metrics import CURSOR, WINDOW, ServingMetrics
from engine.speculation.artifact import build_artifact
from engine.store.database import Database
from engine.store.panels import system, traffic
from engine.store.repositories import export, overview, policies
from engine.store.repositories.overview import Slice
from tests.registry.conftest import NewMlflow
from tests.store.test_rollups import START, compact, records, write

END = START + timedelta(hours=3)
LATER = END + timedelta(hours=2)


class Flaky:
    """An MLflow that fails every third request: before it took the points, or after."""

    def __init__(self, client: MlflowClient, after: bool) -> None:
        self.client, self.after, self.asked = client, after, 0

    def log_batch(self, run_id: str, metrics: Any) -> None:
        self.asked += 1
        if self.after or self.asked % 3:
            self.client.log_batch(run_id, metrics=metrics)
        if self.asked % 3 == 0:
            raise MlflowException("connection refused")


@pytest.fixture(scope="module")
def client(new_mlflow: NewMlflow, tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    return MlflowClient(new_mlflow(tmp_path_factory.mktemp("mlflow") / "mlflow.db"))


@pytest.fixture
def runs(db: Database, tmp_path: Path, client: MlflowClient) -> dict[int, str]:
    """Traffic of two versions over three hours, half of it compacted; a run for each."""
    write(db, tmp_path / "spill", records()[:60:2])
    compact(db, LATER)
    write(db, tmp_path / "spill", records()[1:60:2])
    store = ArtifactStore(tmp_path / "policies")
    experiment = client.create_experiment(uuid4().hex)
    made = {}
    for kind, k in ((ProposerKind.NONE, 0), (ProposerKind.NGRAM, 4)):
        version = ensure_version(db, store, build_artifact(kind, k)).version
        made[version] = client.create_run(experiment).info.run_id
        with db.write() as session:
            policies.set_mlflow(session, version, str(version), made[version])
    assert set(made) == {1, 2}  # the versions of the traffic
    return made


def send(metrics: ServingMetrics, now: datetime = LATER) -> int:
    """Until all is sent; how often MLflow failed."""
    failures = 0
    for _ in range(200):
        try:
            if not metrics.run_once(now):
                return failures
        except SlipstreamError:
            failures += 1
    raise AssertionError("it does not come to an end")


def assert_every_window_once(db: Database, client: MlflowClient, runs: dict[int, str]) -> None:
    with db.read() as session:
        rows = overview.sums(session, Slice(START, END), ("policy_version",))
        cursor = export.cursor(session, CURSOR)
    assert rows
    for version, run_id in runs.items():
        points = client.get_metric_history(run_id, "serving/requests")
        steps = [point.step for point in points]
        assert len(steps) == len(set(steps))
        assert sum(p.value for p in points) == sum(r["requests"] for r in rows if r["policy_version"] == version)
        assert client.get_metric_history(run_id, "serving/e2e_p95_ms")
    assert cursor.written_at is not None
    assert cursor.written_at <= LATER
    assert cursor.error is None


def test_every_window_is_a_point(db: Database, client: MlflowClient, runs: dict[int, str]) -> None:
    assert send(ServingMetrics(db, client)) == 0
    assert_every_window_once(db, client, runs)
    with db.read() as session:
        (row,) = traffic.totals(session, Slice(START - timedelta(minutes=9), START + timedelta(minutes=1)))
    (first,) = [p for p in client.get_metric_history(runs[1], "serving/requests") if p.step == step(START)] or [None]
    (other,) = [p for p in client.get_metric_history(runs[2], "serving/requests") if p.step == step(START)] or [None]
    assert sum(p.value for p in (first, other) if p is not None) == row["requests"]


def step(at: Any) -> int:
    return int((at - serving_metrics.EPOCH) // WINDOW)


@pytest.mark.parametrize("after", [False, True], ids=["before it took them", "after it took them"])
def test_an_mlflow_that_fails_loses_nothing(
    db: Database, client: MlflowClient, runs: dict[int, str], after: bool
) -> None:
    assert send(ServingMetrics(db, Flaky(client, after))) > 5  # type: ignore[arg-type]
    assert_every_window_once(db, client, runs)


def test_a_cursor_that_moves_first_loses_windows(
    db: Database, client: MlflowClient, runs: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault of the two above."""
    right = ServingMetrics._save

    def moves(self: ServingMetrics, moved: Any, now: Any) -> None:
        begin = moved[0].written_at or START - timedelta(minutes=9)
        on = serving_metrics.replace(moved[0], written_at=begin + WINDOW * (moved[0].error is not None))
        right(self, [on], now)

    monkeypatch.setattr(ServingMetrics, "_save", moves)
    send(ServingMetrics(db, Flaky(client, False)))  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        assert_every_window_once(db, client, runs)


def test_a_version_without_a_run_keeps_no_other_waiting_and_is_sent_all_it_missed(
    db: Database, client: MlflowClient, runs: dict[int, str]
) -> None:
    """It was made while MLflow was away: days later its windows are as good as the others'."""
    with db.write() as session:
        policies.set_mlflow(session, 2, "2", None)
    metrics = ServingMetrics(db, client)
    assert send(metrics, LATER + timedelta(days=2)) == 0
    assert client.get_metric_history(runs[1], "serving/requests")
    assert not client.get_metric_history(runs[2], "serving/requests")
    with db.write() as session:
        policies.set_mlflow(session, 2, "2", runs[2])
    assert send(ServingMetrics(db, Flaky(client, False)), LATER + timedelta(days=3)) > 0  # type: ignore[arg-type]
    assert_every_window_once(db, client, runs)
    with db.read() as session:
        assert export.cursors(session, serving_metrics.OWED) == []
        sent = export.cursor(session, CURSOR)
    assert sent.exported == sum(len(client.get_metric_history(run, "serving/requests")) for run in runs.values())


class Refuses:
    """An MLflow that takes nothing of one run."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client, self.run_id = client, run_id

    def log_batch(self, run_id: str, metrics: Any) -> None:
        if run_id == self.run_id:
            raise MlflowException("this run is locked")
        self.client.log_batch(run_id, metrics=metrics)


def test_a_version_that_cannot_be_caught_up_keeps_no_other_waiting_and_is_seen(
    db: Database, client: MlflowClient, runs: dict[int, str]
) -> None:
    with db.write() as session:
        policies.set_mlflow(session, 1, "1", None)
        policies.set_mlflow(session, 2, "2", None)
    half = START + timedelta(hours=1)
    send(ServingMetrics(db, client), half)  # both are owed the first hour
    with db.write() as session:
        for version, run_id in runs.items():
            policies.set_mlflow(session, version, str(version), run_id)
    refusing = ServingMetrics(db, Refuses(client, runs[1]))  # type: ignore[arg-type]
    failures, now = 0, LATER
    for _ in range(100):
        now += timedelta(seconds=1)
        try:
            refusing.run_once(now)
        except SlipstreamError:
            failures += 1
    assert failures > 1
    assert not client.get_metric_history(runs[1], "serving/requests")
    with db.read() as session:
        owed = export.cursors(session, serving_metrics.OWED)
        (shown,) = [row for row in system.exporter(session, Slice(START, END)) if row["exporter"] == CURSOR]
        rows = overview.sums(session, Slice(START, END, version=2))
    assert [(one.name, one.error) for one in owed] == [(f"{CURSOR}/1", "this run is locked")]
    assert shown["error"] == "1: this run is locked"
    points = client.get_metric_history(runs[2], "serving/requests")
    assert sum(point.value for point in points) == sum(row["requests"] for row in rows)
    assert send(ServingMetrics(db, client), now) == 0
    assert_every_window_once(db, client, runs)
    with db.read() as session:
        (shown,) = [row for row in system.exporter(session, Slice(START, END)) if row["exporter"] == CURSOR]
    assert shown["error"] is None
    assert shown["exported"] == sum(len(client.get_metric_history(run, "serving/requests")) for run in runs.values())


def test_a_catch_up_clears_an_old_error(db: Database, client: MlflowClient, runs: dict[int, str]) -> None:
    with db.write() as session:
        policies.set_mlflow(session, 2, "2", None)
    send(ServingMetrics(db, client))
    with db.write() as session:
        policies.set_mlflow(session, 2, "2", runs[2])
        export.save_cursor(session, replace(export.cursor(session, CURSOR), error="an old trouble"), LATER)
    assert ServingMetrics(db, client).run_once(LATER)
    with db.read() as session:
        assert export.cursor(session, CURSOR).error is None


def test_runs_that_mlflow_lost_are_sent_everything_again(
    db: Database, client: MlflowClient, runs: dict[int, str], tmp_path: Path, new_mlflow: NewMlflow
) -> None:
    assert send(ServingMetrics(db, client)) == 0
    fresh = mlflow_registry.connect(new_mlflow(tmp_path / "new.db"), "again")
    fresh.client.create_experiment("again", artifact_location=(tmp_path / "again").as_uri())
    fresh.sync(db, ArtifactStore(tmp_path / "policies"))
    with db.read() as session:
        made = {v.version: v.mlflow_run_id or "" for v in policies.all_versions(session)}
    assert send(ServingMetrics(db, fresh.client)) == 0
    assert_every_window_once(db, fresh.client, made)


def test_an_experiment_that_was_put_away_is_waited_for(
    db: Database, client: MlflowClient, runs: dict[int, str]
) -> None:
    experiment = client.get_run(runs[1]).info.experiment_id
    client.delete_experiment(experiment)
    with pytest.raises(SlipstreamError, match="did not take the metrics"):
        ServingMetrics(db, client).run_once(LATER)
    client.restore_experiment(experiment)
    assert send(ServingMetrics(db, client)) == 0
    assert_every_window_once(db, client, runs)


def test_a_deleted_run_keeps_no_other_waiting(db: Database, client: MlflowClient, runs: dict[int, str]) -> None:
    client.delete_run(runs[2])
    assert send(ServingMetrics(db, client)) == 0
    assert client.get_metric_history(runs[1], "serving/requests")
