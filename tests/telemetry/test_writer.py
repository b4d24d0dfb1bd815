"""Every record is in Postgres once, whatever happens on the way, or is counted as lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from engine.contracts import TraceRecord
from engine.settings import TelemetrySettings
from engine.store.database import Database
from engine.store.models import RollupDeltaRow, TraceBatchRow, TracePayloadRow, TraceRow
from engine.telemetry import rollup
from engine.telemetry.spill import Batch, Spill
from engine.telemetry.writer import TraceWriter
from tests.telemetry.records import START, record

SETTINGS = TelemetrySettings(batch_records=50, batch_delay_s=0.01)


class Outage:
    """Stands in for ``Database.write``: refuses before, or loses the answer after, the commit."""

    def __init__(self, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real, self.mode = db.write, "none"
        self.writes_left: int | None = None  # then it is down
        monkeypatch.setattr(db, "write", self._write)

    def _write(self) -> Any:
        outage = self

        class Context:
            def __enter__(self) -> Any:
                if outage.writes_left is not None:
                    outage.writes_left -= 1
                if outage.mode == "down" or (outage.writes_left or 0) < 0:
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
        requests = session.scalar(select(func.sum(RollupDeltaRow.requests)))
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


def test_a_fault_of_this_code_costs_no_trace_and_holds_up_no_other(
    db: Database, writer: TraceWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch cannot be rolled up, now or ever: it is kept for people to look at, and the others are written."""
    real = rollup.deltas

    def deltas(records: list[TraceRecord], objectives: object) -> object:
        if any(one.error == "trips it" for one in records):
            raise KeyError("no such bucket")
        return real(records, objectives)  # type: ignore[arg-type]

    monkeypatch.setattr(rollup, "deltas", deltas)
    fill(writer, [record(99, error="trips it")])
    writer.start()
    with writer._idle:
        assert writer._idle.wait_for(lambda: writer._pending == 0, 10)
    records = [record(n) for n in range(20)]
    fill(writer, records)
    assert writer.flush(10)
    assert_stored_once(db, records)
    stats = writer.stats()
    assert (stats["set_aside"], stats["dropped"]) == (1, 0)
    assert len(list((tmp_path / "spill").glob("*.broken"))) == 1


@pytest.mark.parametrize("writes", range(1, 9))
def test_an_outage_while_a_bad_record_is_looked_for_loses_nothing(
    db: Database, writer: TraceWriter, outage: Outage, writes: int
) -> None:
    """Part of the batch is written then, under other keys; the rest comes later, and the part is not written twice."""
    records = [record(n) for n in range(20)]
    outage.writes_left = writes
    writer.start()
    fill(writer, [*records[:12], record(99, error="\x00"), *records[12:]])
    with writer._idle:
        assert writer._idle.wait_for(lambda: writer._pending == 0, 10)
    outage.writes_left = None
    assert writer.flush(10)
    assert_stored_once(db, records)
    stats = writer.stats()
    assert (stats["set_aside"], stats["dropped"], stats["written"] + stats["replayed"]) == (1, 0, 20)


def test_a_bad_record_that_cannot_be_kept_does_not_hold_up_the_others(
    db: Database, tmp_path: Path, outage: Outage
) -> None:
    """Neither when it is new nor when it comes back from a spill folder that has filled up meanwhile."""
    spill = Spill(tmp_path, 10**8)
    made = TraceWriter(db, spill, SETTINGS, clock=Clock())
    records = [record(n) for n in range(20)]
    outage.mode = "down"
    made.start()
    fill(made, [*records[:5], record(98, error="\x00"), *records[5:10]])
    with made._idle:
        assert made._idle.wait_for(lambda: made._pending == 0, 10)
    assert spill.files > 0
    spill.max_bytes = 0
    outage.mode = "none"
    fill(made, [*records[10:15], record(99, error="\x00"), *records[15:]])
    assert made.flush(10)
    made.close()
    assert_stored_once(db, records)
    assert (made.stats()["set_aside"], made.stats()["dropped"]) == (0, 2)


def test_a_long_outage_is_caught_up_with_faster_than_it_lasted(db: Database, tmp_path: Path) -> None:
    """A hundred files took a hundred times ``batch_delay_s`` to make. By the real clock, as it is about time."""
    spill, earlier = Spill(tmp_path, 10**8), uuid4()
    records = [record(n) for n in range(100)]
    for number, one in enumerate(records):
        spill.put(Batch(earlier, number, [one]), START)
    made = TraceWriter(db, spill, TelemetrySettings(batch_delay_s=0.25))
    made.start()
    assert made.flush(20)
    made.close()
    assert made.stats()["replayed"] == 100
    assert_stored_once(db, records)


def test_a_full_queue_drops_and_counts(db: Database, tmp_path: Path) -> None:
    small = TraceWriter(db, Spill(tmp_path, 10**8), TelemetrySettings(queue_records=5))
    fill(small, [record(n) for n in range(8)])  # not started, so nothing is taken out
    assert small.stats()["dropped"] == 3
    assert small.stats()["queue"] == 5


@pytest.mark.parametrize("room", [{"batch_records": 4}, {"queue_records": 4}])
def test_a_full_batch_and_the_end_are_not_waited_for(db: Database, tmp_path: Path, room: dict[str, int]) -> None:
    """With an hour to wait: a batch that nobody was woken for would keep ``flush`` until it gives up."""
    made = TraceWriter(db, Spill(tmp_path, 10**8), TelemetrySettings(batch_delay_s=3_600.0, **room))
    records = [record(n) for n in range(10)]
    made.start()
    for at in (0, 4):
        fill(made, records[at : at + 4])
        assert made.flush(20)
    fill(made, records[8:])
    assert made.stats()["written"] == 8
    made.close()
    assert_stored_once(db, records)


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
