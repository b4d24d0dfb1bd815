"""Send every stored trace to MLflow, at the exporter's own pace.

The table is the queue and the cursor moves only when MLflow has answered, so an outage of either side loses nothing;
ids are derived from the trace, so a batch whose answer was lost is the same traces again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

import httpx

from engine.contracts import CANARY, SlipstreamError, Status
from engine.ops import spans
from engine.store.database import Database
from engine.store.models import TraceRow
from engine.store.repositories import export

log = logging.getLogger(__name__)
CURSOR = "mlflow"
REFUSALS = frozenset({400, 413, 422})
"""Answers that speak of the content. Others (no such page, not allowed, too many) speak of the server, and pass."""
SLOW_S = 10.0
"""An ordinary trace that took longer than this is exported whatever the sampling share."""


@dataclass(slots=True)
class MlflowExporter:
    """One exporter of one database. ``share`` in [0, 1] is the sampling share of ordinary traces."""

    database: Database
    client: httpx.Client
    experiment: str
    batch: int
    share: float
    now: Callable[[], datetime]
    _experiment_id: str | None = None

    def run_once(self) -> int:
        """Export one batch; how many traces the cursor passed. SlipstreamError when MLflow would not take it."""
        with self.database.read() as session:
            at = export.cursor(session, CURSOR)
            rows = export.next_traces(session, at, self.batch)
        if not rows:
            return 0
        chosen = [row for row in rows if is_sampled(row, self.share)]
        try:
            refused = self._send(chosen)
            if len(refused) == len(chosen) > 1:
                raise SlipstreamError(f"it refuses every one of them, the first with {refused[0]}")
        except (httpx.HTTPError, SlipstreamError) as error:
            with self.database.write() as session:
                export.save_cursor(session, replace(at, error=str(error)), self.now())
            raise SlipstreamError(
                f"MLflow at {self.client.base_url} did not take {len(chosen)} traces: {error}"
            ) from error
        moved = replace(
            at,
            written_at=rows[-1].written_at,
            trace_id=rows[-1].trace_id,
            exported=at.exported + len(chosen) - len(refused),
            refused=at.refused + len(refused),
            skipped=at.skipped + len(rows) - len(chosen),
            error=None,
        )
        with self.database.write() as session:
            export.save_cursor(session, moved, self.now())
        return len(rows)

    def _send(self, rows: Sequence[TraceRow]) -> list[str]:
        """Send a batch, by halves where MLflow refuses it: one bad trace keeps no other. Gives why each was refused."""
        if not rows:
            return []
        answer = self._post(rows)
        if not answer.is_success:
            self._experiment_id = None  # it may have been deleted, and is then restored
            answer = self._post(rows)
        if answer.is_success:
            return []
        said = f"status {answer.status_code}: {answer.text[:200]}"
        if answer.status_code not in REFUSALS:
            raise SlipstreamError(said)
        if len(rows) > 1:
            middle = len(rows) // 2
            return self._send(rows[:middle]) + self._send(rows[middle:])
        log.error("MLflow refuses trace %s, it stays in Postgres only: %s", rows[0].trace_id, said)
        return [said]

    def _post(self, rows: Sequence[TraceRow]) -> httpx.Response:
        return self.client.post(
            "/v1/traces",
            content=spans.request(rows).SerializeToString(),
            headers={"content-type": "application/x-protobuf", "x-mlflow-experiment-id": self._experiment()},
        )

    def _experiment(self) -> str:
        """The experiment's id, made on first use."""
        if self._experiment_id is None:
            path = "/api/2.0/mlflow/experiments"
            found = self.client.get(f"{path}/get-by-name", params={"experiment_name": self.experiment})
            if found.is_success:
                experiment = found.json()["experiment"]
                self._experiment_id = experiment["experiment_id"]
                if experiment.get("lifecycle_stage") == "deleted":
                    restored = self.client.post(f"{path}/restore", json={"experiment_id": self._experiment_id})
                    if not restored.is_success:
                        raise SlipstreamError(f"experiment {self.experiment!r} is deleted: {restored.text[:200]}")
                    log.warning("experiment %r had been deleted in MLflow and is restored", self.experiment)
            else:
                made = self.client.post(f"{path}/create", json={"name": self.experiment})
                if not made.is_success:
                    raise SlipstreamError(f"no experiment {self.experiment!r}: {made.text[:200]}")
                self._experiment_id = made.json()["experiment_id"]
        return str(self._experiment_id)


def is_sampled(row: TraceRow, share: float) -> bool:
    """All errors, all slow and all canary traces; of the rest the given share, by trace id, so that a retry agrees."""
    if row.status != Status.OK or row.arm == CANARY or row.e2e_s > SLOW_S:
        return True
    return _fraction(row.trace_id) < share


def _fraction(trace_id: UUID) -> float:
    return (trace_id.int & 0xFFFFFFFF) / 2**32
