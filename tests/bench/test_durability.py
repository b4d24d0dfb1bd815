"""Kills lose nothing that was acknowledged, and the drill would see it if they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from engine.bench import durability
from engine.contracts import TraceRecord
from engine.store.database import Database
from engine.store.repositories import audit
from engine.telemetry.writer import TraceWriter
from tests.store.test_rollups import compacted, late_and_half
from tests.telemetry.records import record


class AcknowledgesAtOnce(TraceWriter):
    """The planted fault: says that it keeps what it has only queued."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self._said = named.pop("kept")
        super().__init__(*given, **named)

    def submit(self, record: TraceRecord) -> None:
        self._said([record])
        super().submit(record)


def figures(kills: int, writer: type[TraceWriter]) -> dict[str, float]:
    report = durability.run(kills, 200, 1, lambda line: None, writer)
    return {figure.name.removeprefix("durability_"): figure.value for figure in report.figures}


@pytest.mark.slow
def test_every_acknowledged_trace_is_there_once_after_kills_of_each_kind() -> None:
    found = figures(3, TraceWriter)
    assert (found["missing"], found["twice"], found["rollup_differences"]) == (0, 0, 0)
    assert (found["killed_writer"], found["killed_postgres"], found["killed_everything"]) == (1, 1, 1)


@pytest.mark.slow
def test_the_drill_sees_what_was_acknowledged_too_early() -> None:
    assert figures(1, AcknowledgesAtOnce)["missing"] > 0


def test_the_audit_sees_what_is_missing_or_different(db: Database, tmp_path: Path) -> None:
    late_and_half(db, tmp_path)
    with db.read() as session:
        assert audit.rollup_differences(session) == audit.doubled(session) == 0
        ids = list(session.scalars(text("SELECT trace_id FROM traces")))
        assert audit.missing(session, ids) == 0
        assert audit.missing(session, [*ids, record(99_999).trace_id]) == 1
    for fault in (
        "UPDATE rollups_hour SET accepted = accepted + 1 WHERE at = (SELECT min(at) FROM rollups_hour)",
        "DELETE FROM rollup_histograms_day WHERE metric = 'e2e'",
        "DELETE FROM rollup_deltas WHERE seq = 1",
        "DELETE FROM traces WHERE trace_id = (SELECT trace_id FROM traces LIMIT 1)",
    ):
        with db.write() as session:
            undone = session.begin_nested()
            session.execute(text(fault))
            assert audit.rollup_differences(session) > 0, fault
            undone.rollback()


def test_a_trace_that_started_twice_is_seen(db: Database, tmp_path: Path) -> None:
    compacted(db, tmp_path)
    with db.write() as session:
        names = ", ".join(c for c in session.scalars(text(COLUMNS)) if c != "started_at")
        copied = f"SELECT started_at + interval '1 s', {names} FROM traces LIMIT 1"
        session.execute(text(f"INSERT INTO traces (started_at, {names}) {copied}"))
    with db.read() as session:
        assert audit.doubled(session) == 1


COLUMNS = "SELECT attname FROM pg_attribute WHERE attrelid = 'traces'::regclass AND attnum > 0 AND NOT attisdropped"
