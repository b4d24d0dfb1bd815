"""How a version serves, as metrics on its MLflow run: one point per ten minutes in which it had traffic.

Windows are read from the rollups, oldest first, behind a cursor that moves when MLflow has answered: an MLflow that is
away loses nothing, and a window that is sent again has the same points, which MLflow keeps once. A version that has no
run yet keeps no other waiting: a cursor of its own stays at the first window it was left out of, and it is sent all of
them once it is registered, be that days later.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from engine.contracts import SlipstreamError
from engine.store.database import Database
from engine.store.panels import traffic
from engine.store.panels.traffic import Rows
from engine.store.repositories import export, overview, policies
from engine.store.repositories.export import Cursor
from engine.store.repositories.overview import Slice

if TYPE_CHECKING:
    from mlflow import MlflowClient

CURSOR = "mlflow-serving"
"""How far all windows are sent; ``CURSOR/7`` how far those are that v7 is owed, and why it is not sent them."""
OWED = f"{CURSOR}/"
WINDOW = timedelta(minutes=10)
SETTLED = timedelta(minutes=5)
"""A window is sent this long after its end: the traces of an ordinary minute are there. What was spilled for longer is
in Postgres only."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
GONE = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"})
"""Answers that speak of the run: somebody deleted it. Others speak of the server, and pass."""
LATENCIES = {"e2e": ("p50", "p95", "p99"), "ttft": ("p50", "p95"), "tpot": ("p50", "p95"), "queue": ("p95",)}
RATIOS = (
    *("requests", "tokens_s", "goodput_share", "error_rate", "retry_rate"),
    *("acceptance_length", "acceptance_rate", "draft_length", "observed_gain", "predicted_gain"),
)
log = logging.getLogger(__name__)


@dataclass(slots=True)
class ServingMetrics:
    """Writes the windows of one database to one MLflow."""

    database: Database
    client: MlflowClient

    def run_once(self, now: datetime) -> bool:
        """Send one window: the oldest of all that has not been sent, or else one that a version is owed, of the version
        that has waited longest for its turn; whether there may be more. SlipstreamError when MLflow does not take it.
        """
        with self.database.read() as session:
            at = export.cursor(session, CURSOR)
            runs = {v.version: v.mlflow_run_id for v in policies.all_versions(session)}
            owed = {int(c.name.removeprefix(OWED)): c for c in export.cursors(session, OWED)}
        if self._next(at, runs, owed.keys(), now):
            return True
        for version, own in owed.items():
            if run_id := runs.get(version):
                self._catch_up(at, own, version, run_id, now)
                return True
        return False

    def _next(self, at: Cursor, runs: Mapping[int, str | None], owed: Collection[int], now: datetime) -> bool:
        """The oldest window after the cursor, to every version that has a run and has caught up; the others are owed
        it. Whether there was one."""
        with self.database.read() as session:
            begin = overview.first_window(session, at.written_at, WINDOW)
            if begin is None or begin + WINDOW + SETTLED > now:
                return False
            rows = traffic.totals(session, Slice(begin, begin + WINDOW), ("policy_version",), tuple(LATENCIES))
        served = [row["policy_version"] for row in rows]
        without = [version for version in served if version in owed or runs.get(version) is None]
        moved = self._send_all(at, runs, [row for row in rows if row["policy_version"] not in without], begin, now)
        opened = [Cursor(f"{OWED}{version}", begin) for version in without if version not in owed]
        self._save([moved, *opened], now)
        return True

    def _catch_up(self, at: Cursor, own: Cursor, version: int, run_id: str, now: datetime) -> None:
        """The next window that this version is owed; one at the cursor of all, or later, comes with the others."""
        with self.database.read() as session:
            begin = overview.first_window(session, own.written_at, WINDOW, version)
            done = begin is None or at.written_at is None or begin >= at.written_at
            part = None if begin is None else Slice(begin, begin + WINDOW, version=version)
            rows = [] if done or part is None else traffic.totals(session, part, ("policy_version",), tuple(LATENCIES))
        if done or begin is None:
            with self.database.write() as session:
                export.remove_cursor(session, own.name)
            return
        sent = self._send_all(own, {version: run_id}, rows, begin, now)
        exported, skipped = sent.exported - own.exported, sent.skipped - own.skipped
        both = replace(at, exported=at.exported + exported, skipped=at.skipped + skipped, error=None)
        self._save([sent, both], now)

    def _send_all(
        self, at: Cursor, runs: Mapping[int, str | None], rows: Rows, begin: datetime, now: datetime
    ) -> Cursor:
        """Where the cursor stands when MLflow has taken these rows; otherwise it stays, and says why."""
        sent = 0
        try:
            for row in rows:
                run_id = runs[row["policy_version"]]
                assert run_id is not None
                sent += self._send(run_id, row["policy_version"], row, begin)
        except Exception as error:
            self._save([replace(at, error=str(error))], now)
            raise SlipstreamError(f"MLflow did not take the metrics of {begin:%Y-%m-%d %H:%M}: {error}") from error
        skipped = at.skipped + len(rows) - sent
        return replace(at, written_at=begin + WINDOW, error=None, exported=at.exported + sent, skipped=skipped)

    def _send(self, run_id: str, version: int, row: Mapping[str, Any], begin: datetime) -> bool:
        """Whether MLflow has them now; False where the run is gone."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        ended, step = int((begin + WINDOW).timestamp() * 1000), (begin - EPOCH) // WINDOW
        points = [Metric(name, value, ended, step) for name, value in values(row).items()]
        try:
            self.client.log_batch(run_id, metrics=points)
        except MlflowException as error:
            if error.error_code not in GONE or self._is_put_away(run_id):
                raise
            log.error("the run of v%d takes no metrics any more: %s", version, error)
            return False
        return True

    def _is_put_away(self, run_id: str) -> bool:
        """Whether the run went with its whole experiment: the registry restores it, and is waited for."""
        from mlflow.exceptions import MlflowException

        try:
            experiment = self.client.get_experiment(self.client.get_run(run_id).info.experiment_id)
        except MlflowException as error:
            if error.error_code not in GONE:
                raise
            return False
        return bool(experiment.lifecycle_stage == "deleted")

    def _save(self, moved: Sequence[Cursor], now: datetime) -> None:
        with self.database.write() as session:
            for cursor in moved:
                export.save_cursor(session, cursor, now)


def values(row: Mapping[str, Any]) -> dict[str, float]:
    """Metric → value, of what is known; latencies in ms, rates per second."""
    names = [*RATIOS, *(f"{metric}_{q}" for metric, qs in LATENCIES.items() for q in qs)]
    shown = {name: f"serving/{name}_ms" if name[-3:-2] == "p" else f"serving/{name}" for name in names}
    return {shown[name]: float(row[name]) for name in names if row.get(name) is not None}
