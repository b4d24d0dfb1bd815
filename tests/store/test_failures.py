"""The newest failures of a month are found without reading the month."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import ColumnElement, event, text

from engine.contracts import Status
from engine.store.database import Database
from engine.store.models import TraceRow
from engine.store.repositories import seeding, traces
from engine.store.repositories.overview import Slice
from engine.store.repositories.traces import Filter

FIRST, DAYS, A_DAY = date(2026, 3, 1), 3, 20_000
START = datetime(2026, 3, 1, tzinfo=UTC)
MONTH = Slice(START, START + timedelta(days=30))
PAGE = 20


@pytest.fixture
def seeded(db: Database) -> Database:
    for number in range(DAYS):
        with db.write() as session:
            day = FIRST + timedelta(days=number)
            seeding.add_day(session, day, number, A_DAY, MONTH.until, 0.1 * number)
    with db.write() as session:
        seeding.analyze(session)
    return db


def _rows_read(db: Database, chosen: Filter) -> float:
    """Rows that the scans under a page of the list give on, by Postgres' own account."""
    statements: list[tuple[str, Any]] = []

    def keep(_c: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool) -> None:
        statements.append((statement, parameters))

    event.listen(db.engine, "before_cursor_execute", keep)
    try:
        with db.read() as session:
            assert len(traces.listed(session, MONTH, chosen, limit=PAGE)) == PAGE
            statement, parameters = statements[-1]
            asked = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}"
            found = session.connection().exec_driver_sql(asked, parameters).scalar_one()
    finally:
        event.remove(db.engine, "before_cursor_execute", keep)
    plan = json.loads(found) if isinstance(found, str) else found
    return sum(node["Actual Rows"] for node in _scans(plan[0]["Plan"]))


def _scans(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    below = plan.get("Plans", [])
    if not below:
        yield plan
    for part in below:
        yield from _scans(part)


@pytest.mark.parametrize("chosen", [Filter(failed=True), Filter(status="error"), Filter(status="cancelled")])
def test_a_page_of_failures_reads_little_more_than_itself(
    seeded: Database, chosen: Filter, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _rows_read(seeded, chosen) < 3 * PAGE

    def twice(statuses: Collection[Status]) -> list[ColumnElement[bool]]:
        return [TraceRow.status.in_(statuses), TraceRow.status != Status.OK]

    monkeypatch.setattr(traces, "_ended", twice)
    assert _rows_read(seeded, chosen) > 3 * PAGE, "the statistics would have been right without it"


def test_each_status_lists_its_own(seeded: Database) -> None:
    with seeded.read() as session:
        counted = session.execute(text("SELECT status, count(*) FROM traces GROUP BY 1")).all()
        assert {status for status, _ in counted} == {"ok", "error", "cancelled"}
        for status, many in counted:
            listed = traces.listed(session, MONTH, Filter(status=status), limit=DAYS * A_DAY)
            assert (len(listed), {row["status"] for row in listed}) == (many, {status})
