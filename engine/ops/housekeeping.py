"""Behind the scenes: upkeep of the trace store, traces exported, MLflow kept a mirror of Postgres.

Nothing here is on the path of a request, a rollout or a rollback. Each chore fails alone, loudly, and is tried again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx

from engine.contracts import SlipstreamError
from engine.ops import drift, upkeep
from engine.ops.exporter import MlflowExporter
from engine.registry import mlflow_registry
from engine.registry.artifacts import ArtifactStore
from engine.registry.mlflow_registry import MlflowRegistry
from engine.registry.serving_metrics import ServingMetrics
from engine.settings import Settings, TelemetrySettings
from engine.store.database import Database

RETRY_S = 30.0
"""After a failure a chore waits this long, so that a server that is down is not hammered."""
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Chore:
    """Something to do every ``every_s`` seconds. ``act`` says whether there is more to do at once."""

    name: str
    every_s: float
    act: Callable[[], bool]
    due: float = 0.0
    failing: bool = False


def run(settings: Settings, database: Database, stop: threading.Event) -> None:
    """Do the chores until ``stop`` is set."""
    chores = of_store(settings.telemetry, database, lambda: datetime.now(UTC))
    client = None
    if settings.mlflow_tracking_uri:
        client = httpx.Client(base_url=settings.mlflow_tracking_uri, timeout=30.0)
        exporter = MlflowExporter(
            database,
            client,
            settings.mlflow.experiment,
            settings.mlflow.export_batch,
            settings.mlflow.export_share,
            lambda: datetime.now(UTC),
        )
        chores.append(Chore("trace export", 2.0, lambda: exporter.run_once() == exporter.batch))
        registry = mlflow_registry.connect(settings.mlflow_tracking_uri, settings.mlflow.experiment)
        store = ArtifactStore(settings.dir("policies"))
        chores.append(Chore("model registry", 10.0, lambda: mirror_registry(registry, database, store)))
        serving = ServingMetrics(database, registry.client)
        chores.append(Chore("serving metrics", 60.0, lambda: serving.run_once(datetime.now(UTC))))
    else:
        log.warning("no MLflow tracking URI: traces are not exported and versions not registered there")
    while not stop.is_set():
        for chore in chores:
            attend(chore, time.monotonic())
        stop.wait(0.5)
    if client is not None:
        client.close()


def of_store(telemetry: TelemetrySettings, database: Database, now: Callable[[], datetime]) -> list[Chore]:
    """What the trace store needs, MLflow or not."""
    return [
        Chore("partitions", 300.0, lambda: upkeep.keep_partitions(database, telemetry, now())),
        Chore("drift", 120.0, lambda: drift.look(database, now())),
        Chore("rollups", 15.0, lambda: upkeep.compact(database, now())),
    ]


def attend(chore: Chore, now: float) -> None:
    """Do a chore if it is due. A failure is logged when it begins and when it ends, not each time."""
    if now < chore.due:
        return
    try:
        more = chore.act()
    except Exception as error:
        # Whatever a chore meets must not end the process: the other chores do not depend on it.
        if not chore.failing:
            known = isinstance(error, (SlipstreamError, httpx.HTTPError))
            log.error(
                "%s: %s; trying again every %.0f s", chore.name, error, RETRY_S, exc_info=None if known else error
            )
        chore.failing = True
        chore.due = now + RETRY_S
        return
    if chore.failing:
        log.info("%s works again", chore.name)
    chore.failing = False
    chore.due = now if more else now + chore.every_s


def mirror_registry(registry: MlflowRegistry, database: Database, store: ArtifactStore) -> bool:
    """Register in MLflow what Postgres has and MLflow lacks; make the aliases follow the ledger."""
    registry.sync(database, store)
    return False
