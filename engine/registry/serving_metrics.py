"""How a version serves, as metrics on its MLflow run: one point per ten minutes in which it had traffic.

Windows are read from the rollups, oldest first, behind a cursor that moves when MLflow has answered: an MLflow that is
away loses nothing, and a window that is sent again has the same points, which MLflow keeps once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from engine.contracts import SlipstreamError
from engine.store.database import Database
from engine.store.panels import traffic
from engine.store.repositories import export, overview, policies
from engine.store.repositories.export import Cursor
from engine.store.repositories.overview import Slice

if TYPE_CHECKING:
    from mlflow import MlflowClient

CURSOR = "mlflow-serving"
WINDOW = timedelta(minutes=10)
SETTLED = timedelta(minutes=5)
"""A window is sent this long after its end: the traces of an ordinary minute are there. What was spilled for longer is
in Postgres only."""
UNREGISTERED = timedelta(hours=1)
"""A version that MLflow does not know this long after the window keeps no other waiting any more."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
GONE = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"})
"""Answers that speak of the run: somebody deleted it. Others speak of the server, and pass."""
LATENCIES = {"e2e": ("p50", "p95", "p99"), "ttft": ("p50", "p95"), "tpot": ("p50", "p95"), "queue": ("p95",)}
RATIOS = (
    *("requests", "tokens_s", "goodput_share", "error_rate", "retry_rate"),
    *("acceptance_length", "acceptance_rate", "draft_length", "observed_gain"),
)
log = logging.getLogger(__name__)


@dataclass(slots=True)
class ServingMetrics:
    """Writes the windows of one database to one MLflow."""

    database: Database
    client: MlflowClient

    def run_once(self, now: datetime) -> bool:
        """Send the oldest window that has not been sent; whether there may be more. SlipstreamError when MLflow does
        not take it."""
        with self.database.read() as session:
            at = export.cursor(session, CURSOR)
            begin = overview.first_window(session, at.written_at, WINDOW)
            if begin is None or begin + WINDOW + SETTLED > now:
                return False
            rows = traffic.totals(session, Slice(begin, begin + WINDOW), ("policy_version",), tuple(LATENCIES))
            runs = {v.version: v.mlflow_run_id for v in policies.all_versions(session)}
        moved = replace(at, written_at=begin + WINDOW, error=None)
        try:
            for row in rows:
                version = row["policy_version"]
                run_id = runs.get(version)
                if run_id is None and now < begin + WINDOW + UNREGISTERED:
                    raise SlipstreamError(f"v{version} is not registered there yet")
                sent = run_id is not None and self._send(run_id, version, row, begin)
                moved = replace(moved, exported=moved.exported + sent, skipped=moved.skipped + (not sent))
        except Exception as error:
            self._save(replace(at, error=str(error)), now)
            raise SlipstreamError(f"MLflow did not take the metrics of {begin:%Y-%m-%d %H:%M}: {error}") from error
        self._save(moved, now)
        return True

    def _send(self, run_id: str, version: int, row: Mapping[str, Any], begin: datetime) -> bool:
        """Whether MLflow has them now; False where the run is gone."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        ended, step = int((begin + WINDOW).timestamp() * 1000), (begin - EPOCH) // WINDOW
        points = [Metric(name, value, ended, step) for name, value in values(row).items()]
        try:
            self.client.log_batch(run_id, metrics=points)
        except MlflowException as error:
            if error.error_code not in GONE:
                raise
            log.error("the run of v%d takes no metrics any more: %s", version, error)
            return False
        return True

    def _save(self, moved: Cursor, now: datetime) -> None:
        with self.database.write() as session:
            export.save_cursor(session, moved, now)


def values(row: Mapping[str, Any]) -> dict[str, float]:
    """Metric → value, of what is known; latencies in ms, rates per second."""
    names = [*RATIOS, *(f"{metric}_{q}" for metric, qs in LATENCIES.items() for q in qs)]
    shown = {name: f"serving/{name}_ms" if name[-3:-2] == "p" else f"serving/{name}" for name in names}
    return {shown[name]: float(row[name]) for name in names if row.get(name) is not None}
