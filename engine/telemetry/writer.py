"""The trace writer: a bounded queue, one thread, batches by COPY, and a spill folder for when Postgres is away.

The request path only puts a record into the queue. A batch is one transaction under its key (writer_id, seq): traces,
payloads and rollup deltas are there together or not at all, and a batch whose commit was not answered is written again
without harm.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import UTC, date, datetime
from typing import Any
from uuid import uuid4

import psycopg
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from engine.contracts import TraceRecord
from engine.settings import TelemetrySettings
from engine.store.database import Database
from engine.store.repositories import ingest, partitions
from engine.telemetry import rollup
from engine.telemetry.spill import Batch, Spill

log = logging.getLogger(__name__)
REFUSED = (DataError, IntegrityError, psycopg.DataError, psycopg.IntegrityError, ValueError, TypeError)
"""What says that a record is bad, not that the database is away. COPY raises psycopg's own errors, unwrapped."""
RETRY_S = 0.5
"""After a failed write the database is left alone this long; batches go to the spill folder meanwhile."""


class TraceWriter:
    """Takes records from any thread and sees that each is in Postgres once. ``clock`` is monotonic seconds.

    ``kept`` is told of records that no kill of any process can take away any more: their batch is committed, or synced
    to the spill folder. Until then, for ``batch_delay_s`` and the time of a write, they are in this process' memory.
    """

    def __init__(
        self,
        database: Database,
        spill: Spill,
        settings: TelemetrySettings,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        kept: Callable[[Sequence[TraceRecord]], None] = lambda records: None,
    ) -> None:
        self._kept = kept
        self._database, self._spill, self._settings = database, spill, settings
        self._clock, self._now = clock, now
        self._queue: queue.Queue[TraceRecord] = queue.Queue(settings.queue_records)
        self._batch = min(settings.batch_records, max(1, settings.queue_records // 2))  # before it is full
        self._writer_id, self._seq = uuid4(), 0
        self._retry_at = 0.0
        self._known_days: set[date] = set()
        self._stop = threading.Event()
        self._full = threading.Event()  # a batch, or the end: not to be waited any longer
        self._idle = threading.Condition()
        self._pending = 0  # records taken from callers and neither written, spilled nor dropped
        self._stats: dict[str, Any] = {
            "written": 0, "spilled": 0, "replayed": 0, "dropped": 0, "set_aside": 0, "last_write": None, "error": None,
        }  # fmt: skip
        self._thread = threading.Thread(target=self._run, name="trace-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, record: TraceRecord) -> None:
        """Hand over a record; never blocks. A full queue drops it, and counts that."""
        with self._idle:
            try:
                self._queue.put_nowait(record)
            except queue.Full:
                self._stats["dropped"] += 1
            else:
                self._pending += 1
                if self._queue.qsize() >= self._batch:
                    self._full.set()

    def flush(self, timeout_s: float) -> bool:
        """Wait until every record is in Postgres, the spilled ones too; False when that took too long."""
        with self._idle:
            return self._idle.wait_for(lambda: self._pending == 0 and self._spill.files == 0, timeout_s)

    def close(self) -> None:
        """Write what is queued, or spill it where the database is away; then end."""
        self._stop.set()
        self._full.set()
        self._thread.join()

    def stats(self) -> dict[str, Any]:
        """Counts since the start, and how much waits in queue and spill."""
        waiting = {"queue": self._queue.qsize(), "queue_max": self._settings.queue_records}
        spill = {
            "spill_files": self._spill.files,
            "spill_bytes": self._spill.bytes,
            "spill_unreadable": self._spill.unreadable,
        }
        return {**self._stats, **waiting, **spill}

    def _run(self) -> None:
        while True:
            stopping = self._stop.is_set()
            records = self._take()
            if not records and stopping:
                return
            try:
                if records:
                    self._handle(Batch(self._writer_id, self._next_seq(), records))
                if not stopping:
                    self._replay()
            except Exception as error:
                self._trouble(error)
                self._retry_at = self._clock() + RETRY_S
            with self._idle:
                self._pending -= len(records)
                self._idle.notify_all()

    def _take(self) -> list[TraceRecord]:
        """The records of the next ``batch_delay_s``, or a full batch sooner; none waits longer in the queue.

        The thread sleeps meanwhile. Woken for each record it would take a processor from a pass as often.
        """
        if not self._stop.is_set():
            self._full.wait(self._settings.batch_delay_s)
            self._full.clear()  # before looking: who fills the queue from here on sets it again
        records = [self._queue.get_nowait() for _ in range(min(self._queue.qsize(), self._batch))]  # none but it takes
        if self._queue.qsize() >= self._batch:
            self._full.set()
        return records

    def _handle(self, batch: Batch) -> None:
        """Write a batch, else spill it, else drop it and say so."""
        try:
            if self._clock() >= self._retry_at and self._write(batch, "written"):
                return
        except Exception as error:
            self._trouble(error)
        try:
            self._spill.put(batch, self._now())
            self._stats["spilled"] += len(batch.records)
            self._kept(batch.records)
        except (OSError, TypeError, ValueError) as error:
            self._lose(batch, error)

    def _trouble(self, error: Exception) -> None:
        """A fault of this code: it costs nobody a trace, and the thread goes on."""
        log.exception("a batch of traces could not be handled")
        self._stats["error"] = f"{type(error).__name__}: {error}"

    def _lose(self, batch: Batch, error: Exception) -> None:
        lost = len(batch.records)
        self._stats["dropped"] += lost
        self._stats["error"] = f"spill: {error}"
        log.error("%d traces are lost: neither Postgres nor the spill folder takes them: %s", lost, error)

    def _replay(self) -> None:
        """Write spilled batches, oldest first, for as long as a new one may wait: so that a long outage is caught up
        with in a fraction of its length."""
        until = self._clock() + self._settings.batch_delay_s
        while self._spill.files and not self._stop.is_set() and self._clock() >= self._retry_at:
            found = self._spill.oldest()
            if found is None:
                return
            name, batch = found
            try:
                if self._write(batch, "replayed"):
                    self._spill.remove(name)
            except Exception as error:  # it would fail again and keep all younger ones waiting
                self._trouble(error)
                self._spill.set_aside(name)
                self._stats["set_aside"] += len(batch.records)
            if self._clock() >= until:
                return

    def _write(self, batch: Batch, how: str) -> bool:
        """Whether the batch needs nothing more; False when the database is away. A bad record is set aside alone.

        ``how`` is the count that what was written goes to.
        """
        try:
            self._transaction(batch)
        except REFUSED as error:
            return self._isolate(batch, error, how)
        except (
            SQLAlchemyError,
            psycopg.Error,
        ) as error:  # away, restarting, out of disk, not migrated: all of these pass
            if self._stats["error"] is None:
                log.warning("traces go to the spill folder: %s", str(error).splitlines()[0])
            self._stats["error"] = str(error).splitlines()[0]
            self._retry_at = self._clock() + RETRY_S
            return False
        if self._stats["error"] is not None:
            log.info("Postgres takes traces again")
        self._stats |= {"error": None, "last_write": self._now().isoformat()}
        self._stats[how] += len(batch.records)
        if how == "written":  # the others were kept before, by the spill folder
            self._kept(batch.records)
        return True

    def _isolate(self, batch: Batch, error: Exception, how: str) -> bool:
        """Find the record that Postgres refuses, by halves; the others are written, or spilled under keys of their own.

        False when they could not be spilled either. The whole batch is then kept where it was, and what was written of
        it is refused as a duplicate, one by one, when it comes again.
        """
        if len(batch.records) > 1:
            middle = len(batch.records) // 2
            for half in (batch.records[:middle], batch.records[middle:]):
                part = Batch(self._writer_id, self._next_seq(), half)
                if self._write(part, how):
                    continue
                try:
                    self._spill.put(part, self._now())
                except OSError:
                    return False
                if how == "written":  # the others were counted before
                    self._stats["spilled"] += len(half)
                    self._kept(half)
            return True
        if isinstance(getattr(error, "orig", error), psycopg.errors.UniqueViolation):
            return True  # it is there already, from a writing that was interrupted while isolating
        log.error("trace %s is set aside, Postgres refuses it: %s", batch.records[0].trace_id, error)
        try:
            self._spill.set_aside(self._spill.put(batch, self._now()))
            self._stats["set_aside"] += 1
        except OSError as full:  # what cannot be kept must not hold up what can be written
            self._lose(batch, full)
        return True

    def _transaction(self, batch: Batch) -> None:
        deltas = rollup.deltas(batch.records, self._settings.objectives)
        with self._database.write() as session:
            if not ingest.claim(session, batch.writer_id, batch.seq, len(batch.records)):
                return
            days = {record.started_at.astimezone(UTC).date() for record in batch.records}
            for day in sorted(days - self._known_days):
                partitions.ensure(session, day)
            ingest.copy_traces(session, map(_trace_row, batch.records))
            ingest.copy_payloads(session, (_payload_row(r) for r in batch.records if r.payload is not None))
            ingest.add_rollups(session, *_rollup_rows(batch, deltas))
        self._known_days |= days

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq


def _trace_row(record: TraceRecord) -> Sequence[Any]:
    return [getattr(record, name) for name in ingest.TRACE_COLUMNS]


def _payload_row(record: TraceRecord) -> Sequence[Any]:
    payload = record.payload
    assert payload is not None
    row = {
        "started_at": record.started_at,
        "trace_id": record.trace_id,
        "prompt_ids": payload.prompt_ids,
        "output_ids": payload.output_ids,
        "proposed": [token for step in payload.steps for token in step.proposed],
        "step_drafted": [len(step.proposed) for step in payload.steps],
        "step_accepted": [step.accepted for step in payload.steps],
        "step_emitted": [step.emitted for step in payload.steps],
    }
    return [row[name] for name in ingest.PAYLOAD_COLUMNS]


def _columns(record: rollup.Key | rollup.Sums) -> dict[str, Any]:
    """``asdict`` without its copies."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _rollup_rows(batch: Batch, deltas: Sequence[rollup.Delta]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    sums: list[dict[str, Any]] = []
    histograms: list[dict[str, Any]] = []
    for ordinal, delta in enumerate(deltas):
        shared = _columns(delta.key) | {"writer_id": batch.writer_id, "seq": batch.seq, "ordinal": ordinal}
        sums.append(shared | _columns(delta.sums))
        for metric, (indices, counts) in delta.histograms.items():
            histograms.append(shared | {"metric": metric, "idx": indices, "cnt": counts})
    return sums, histograms
