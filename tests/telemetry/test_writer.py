"""Every record is in Postgres once, whatever happens on the way, or is counted as lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from engine.contracts import TraceRecord
from engine.settings import TelemetrySettings
from engine.store import histogram
from engine.store.database import Database
from engine.store.models import RollupHistogramRow, RollupRow, TraceBatchRow, TracePayloadRow, TraceRow
from engine.telemetry import rollup
from engine.telemetry.spill import Batch, Spill
from engine.telemetry.writer import TraceWriter
from tests.telemetry.records import START, record

SETTINGS = TelemetrySettings(batch_records=50, batch_delay_s=0.01)


class Outage:
    """Stands in for ``Database.write``: refuses before, or loses the answer after, the commit."""

    def __init__(self, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real, self.mode = db.write, "none"
        monkeypatch.setattr(db, "write", self._write)

    def _write(self) -> Any:
        outage = self

        class Context:
            def __enter__(self) -> Any:
                if outage.mode == "down":
                    raise OperationalError("connect", {}, Exception("connection refused"))
                self.inner = outage._real()
                return self.inner.__enter__()

            def __exit__(self, *error: Any) -> Any:
                done = self.inner.__exit__(*error)
                if outage.mode == "answer lost" and error[0] is None:
                    raise OperationalError("commit", {}, Exception("server closed the connection unexpectedly"))
                return done

        return Context()


@pytest.fixture
def outage(db: Database, monkeypatch: pytest.MonkeyPatch) -> Outage:
    return Outage(db, monkeypatch)


class Clock:
    """Monotonic seconds that jump ahead at each reading, so that a retry is always due."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def writer(db: Database, tmp_path: Path) -> Iterator[TraceWriter]:
    made = TraceWriter(db, Spill(tmp_path / "spill", 10**8), SETTINGS, clock=Clock(), now=lambda: START)
    yield made
    if made._thread.is_alive():
        made.close()


def fill(writer: TraceWriter, records: list[TraceRecord]) -> None:
    for one in records:
        writer.submit(one)


def assert_stored_once(db: Database, records: list[TraceRecord]) -> None:
    """Traces, payloads and rollups all hold exactly these records."""
    with db.read() as session:
        stored = list(session.scalars(select(TraceRow)))
        payloads = session.scalar(select(func.count()).select_from(TracePayloadRow))
        requests = session.scalar(select(func.sum(RollupRow.requests)))
    assert sorted(row.trace_id for row in stored) == sorted(r.trace_id for r in records)
    assert payloads == sum(r.payload is not None for r in records)
    assert requests == len(records)


def test_records_come_back_as_they_were(db: Database, writer: TraceWriter) -> None:
    one = record(1)
    writer.start()
    fill(writer, [one])
    assert writer.flush(10)
    with db.read() as session:
        row = session.scalars(select(TraceRow)).one()
        payload = session.scalars(select(TracePayloadRow)).one()
    for name in ("trace_id", "started_at", "arm", "tenant", "ttft_s", "drafted", "retry", "trainable"):
        assert getattr(row, name) == getattr(one, name)
    assert row.status == one.status.value
    assert tuple(row.accepted_per_pos) == one.accepted_per_pos
    assert one.payload is not None
    assert tuple(payload.output_ids) == one.payload.output_ids
    assert payload.step_accepted == [step.accepted for step in one.payload.steps]
    assert len(payload.proposed) == sum(payload.step_drafted)


def test_rollups_equal_the_raw_traces(db: Database, writer: TraceWriter) -> None:
    """The property the dashboard rests on: sums and percentiles from rollups are those of the traces."""
    records = [record(n) for n in range(400)]
    writer.start()
    fill(writer, records)
    assert writer.flush(20)
    assert_stored_once(db, records)
    expected = {delta.key: delta for delta in rollup.deltas(records)}
    assert len({key.minute for key in expected}) > 3
    with db.read() as session:
        sums = list(session.scalars(select(RollupRow)))
        buckets = list(session.scalars(select(RollupHistogramRow)))
    for key, delta in expected.items():
        mine = [row for row in sums if all(getattr(row, name) == getattr(key, name) for name in key.__slots__)]
        for name in ("requests", "errors", "cancelled", "retries", "output_tokens", "steps", "drafted", "accepted"):
            assert sum(getattr(row, name) for row in mine) == getattr(delta.sums, name)
        for position, n in enumerate(delta.sums.accepted_per_pos):
            assert sum(row.accepted_per_pos[position] for row in mine if position < len(row.accepted_per_pos)) == n
        for metric, pair in delta.histograms.items():
            parts = [
                (row.idx, row.cnt)
                for row in buckets
                if row.metric == metric and all(getattr(row, name) == getattr(key, name) for name in key.__slots__)
            ]
            assert histogram.merge(parts) == histogram.merge([pair])


def test_an_outage_spills_and_is_replayed_once(db: Database, writer: TraceWriter, outage: Outage) -> None:
    records = [record(n) for n in range(120)]
    outage.mode = "down"
    writer.start()
    fill(writer, records[:100])
    with writer._idle:
        assert writer._idle.wait_for(lambda: writer._pending == 0, 10)
    assert writer.stats()["spilled"] == 100
    assert "refused" in writer.stats()["error"]
    outage.mode = "none"
    fill(writer, records[100:])
    assert writer.flush(10)
    assert_stored_once(db, records)
    assert writer.stats()["error"] is None


def test_a_commit_whose_answer_was_lost_is_not_written_twice(db: Database, writer: TraceWriter, outage: Outage) -> None:
    records = [record(n) for n in range(30)]
    outage.mode = "answer lost"
    writer.start()
    fill(writer, records)
    with writer._idle:
        assert writer._idle.wait_for(lambda: writer._pending == 0, 10)
    assert writer.stats()["spilled"] > 0
    outage.mode = "none"
    assert writer.flush(10)
    assert_stored_once(db, records)


def test_the_batch_key_is_what_keeps_it_once(
    db: Database, writer: TraceWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: without the key a second writing of the rollups goes through."""
    batch = Batch(writer._writer_id, 1, [record(1)])
    writer._transaction(batch)
    writer._transaction(batch)
    assert_stored_once(db, list(batch.records))
    monkeypatch.setattr("engine.store.repositories.ingest.claim", lambda *_: True)
    with pytest.raises(Exception, match=r"duplicate key|UniqueViolation"):
        writer._transaction(batch)


def test_spilled_batches_of_an_earlier_process_are_replayed(
    db: Database, tmp_path: Path, outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "spill"
    first = TraceWriter(db, Spill(folder, 10**8), SETTINGS, clock=Clock())
    outage.mode = "down"
    first.start()
    records = [record(n) for n in range(40)]
    fill(first, records)
    first.close()
    assert list(folder.glob("*.jsonl"))
    outage.mode = "none"
    second = TraceWriter(db, Spill(folder, 10**8), SETTINGS, clock=Clock())
    second.start()
    assert second.flush(10)
    second.close()
    assert_stored_once(db, records)


def test_one_bad_record_does_not_hold_up_the_others(db: Database, writer: TraceWriter, tmp_path: Path) -> None:
    records = [record(n) for n in range(20)]
    poison = record(99, error="text with \x00 in it")
    writer.start()
    fill(writer, [*records[:10], poison, *records[10:]])
    assert writer.flush(10)
    assert_stored_once(db, records)
    assert writer.stats()["set_aside"] == 1
    assert len(list((tmp_path / "spill").glob("*.broken"))) == 1


def test_a_full_queue_drops_and_counts(db: Database, tmp_path: Path) -> None:
    small = TraceWriter(db, Spill(tmp_path, 10**8), TelemetrySettings(queue_records=5))
    fill(small, [record(n) for n in range(8)])  # not started, so nothing is taken out
    assert small.stats()["dropped"] == 3
    assert small.stats()["queue"] == 5


def test_a_full_spill_folder_drops_and_counts(db: Database, tmp_path: Path, outage: Outage) -> None:
    outage.mode = "down"
    tight = TraceWriter(db, Spill(tmp_path, 100), SETTINGS, clock=Clock())
    tight.start()
    fill(tight, [record(1)])
    tight.close()
    assert tight.stats()["dropped"] == 1
    assert "holds" in tight.stats()["error"]


def test_closing_writes_what_is_queued(db: Database, writer: TraceWriter) -> None:
    records = [record(n) for n in range(130)]
    fill(writer, records)
    writer.start()
    writer.close()
    assert_stored_once(db, records)
    with db.read() as session:
        assert session.scalar(select(func.sum(TraceBatchRow.records))) == 130
