"""A sample of requests is fair, has the load that its requests met, and costs what it holds, not what its window does.

The oracles are SQL over ``traces`` and the records themselves; faults planted in what is read must show.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import text

from engine.contracts import Status
from engine.ops import upkeep
from engine.store.database import Database, ReadSession
from engine.store.repositories import overview, requests, seeding
from engine.store.repositories.overview import Slice
from tests.databases import copied
from tests.store.test_rollups import (
    END,
    SETTINGS,
    START,
    WINDOWS,
    compacted,
    deltas_only,
    late_and_half,
    rebuilt,
    records,
)
from tests.store.test_rollups import retained_by_the_hour as retained

ANSWERED = [one.started_at for one in records() if one.status is Status.OK]
RAGGED = Slice(ANSWERED[3] + timedelta(microseconds=1), ANSWERED[-9])
"""Its ends lie within minutes that hold a request beyond it."""
INSIDE = Slice(ANSWERED[50], ANSWERED[50] + timedelta(seconds=1))
SEEDED = 30_000
"""Traces of the long window, over three days."""
LIMIT = 1_000
LONG = Slice(datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 3, 4, tzinfo=UTC))


def raw(session: ReadSession, part: Slice) -> int:
    where, values = requests._conditions(part)
    return session.execute(text(f"SELECT count(*) FROM traces WHERE {where}"), values).scalar_one()


def assert_counted(db: Database) -> None:
    with db.read() as session:
        for part in (*WINDOWS.values(), replace(WINDOWS["all"], versions=(2,)), RAGGED, INSIDE):
            assert requests.answered(session, part) == raw(session, part), part
        assert raw(session, RAGGED) > 500


@pytest.mark.parametrize("kept", [deltas_only, compacted, late_and_half, retained])
def test_the_count_from_rollups_is_that_of_the_traces(
    db: Database, tmp_path: Path, kept: Callable[[Database, Path], None]
) -> None:
    """However far compaction is, and where rollups outlive their traces."""
    kept(db, tmp_path)
    if kept is not retained:
        assert_counted(db)
        return
    with db.read() as session:
        assert 0 < requests.answered(session, WINDOWS["all"]) == raw(session, WINDOWS["all"])


def _deltas_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    none = "(SELECT * FROM rollup_delta_histograms LIMIT 0) AS none"
    monkeypatch.setattr(overview, "_HISTOGRAMS", (overview._HISTOGRAMS[0], none))


def _ends_are_whole_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slice, "by_minutes", lambda part: (part, []))


@pytest.mark.parametrize("fault", [_deltas_are_forgotten, _ends_are_whole_minutes])
def test_a_planted_fault_in_counting_shows(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    late_and_half(db, tmp_path)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        assert_counted(db)


def assert_load(db: Database) -> None:
    """Of every answered request: seconds of service begun on its replica in its minute, of all requests, / 60."""
    seconds = defaultdict[tuple[str, datetime], float](float)
    for one in records():
        seconds[one.replica_id, one.started_at.replace(second=0, microsecond=0)] += one.e2e_s
    of = {one.trace_id: (one.replica_id, one.started_at.replace(second=0, microsecond=0)) for one in records()}
    with db.read() as session:
        found = requests.sample(session, WINDOWS["all"])
    assert {*found.trace_id} == {one.trace_id for one in records() if one.status is Status.OK}
    assert found.share == 1.0
    np.testing.assert_allclose(found.in_flight, [seconds[of[one]] / 60 for one in found.trace_id], rtol=1e-9)


@pytest.mark.parametrize("kept", [deltas_only, compacted, late_and_half, rebuilt])
def test_the_load_is_that_of_all_requests_of_the_minute(
    db: Database, tmp_path: Path, kept: Callable[[Database, Path], None]
) -> None:
    kept(db, tmp_path)
    assert_load(db)


@pytest.mark.parametrize(("unknown", "is_right"), [("NaN", True), ("0", False)])
def test_the_load_of_what_an_engine_of_before_wrote_is_read_from_its_traces(
    db: Database, tmp_path: Path, unknown: str, is_right: bool
) -> None:
    """It says nothing of the seconds of service, which is not to say that there were none."""
    late_and_half(db, tmp_path)
    with db.write() as session:
        for table in ("rollups_minute", "rollup_deltas"):
            some = "at BETWEEN :since AND :until AND replica_id = 'replica-1'"
            values = {"since": START + timedelta(hours=5), "until": END - timedelta(hours=9), "unknown": unknown}
            session.execute(text(f"UPDATE {table} SET e2e_s = CAST(:unknown AS float8) WHERE {some}"), values)
    if is_right:
        assert_load(db)
    else:
        with pytest.raises(AssertionError):
            assert_load(db)


@pytest.fixture(scope="module")
def long(postgres_url: str) -> Iterator[Database]:
    """Three days full of made-up traces, with their rollups and statistics."""
    with copied(postgres_url) as url:
        database = Database(url, application="tests")
        for number in range(3):
            with database.write() as session:
                day = (LONG.since + timedelta(days=number)).date()
                seeding.add_day(session, day, 3 + number, SEEDED // 3, LONG.until, 0.1 * number)
        upkeep.rebuild(database, SETTINGS, None, None, lambda line: None)
        with database.write() as session:
            seeding.analyze(session)
        yield database
        database.close()


def rows_read(session: ReadSession, part: Slice) -> tuple[int, int]:
    """Requests of a sample, and rows of traces that were looked at for it."""
    session.execute(text("SET LOCAL max_parallel_workers_per_gather = 0"))  # a worker counts for itself
    before = _looked_at(session)
    found = requests.sample(session, part, LIMIT)
    return len(found), _looked_at(session) - before


def _looked_at(session: ReadSession) -> int:
    """By this connection; what it did a moment ago may be among it."""
    rows = """
        SELECT coalesce(sum(seq_tup_read + coalesce(idx_tup_fetch, 0)), 0) FROM pg_stat_xact_user_tables
        WHERE relname ~ '^traces_p[0-9]+$'"""
    return int(session.execute(text(rows)).scalar_one())


def assert_reads_little(session: ReadSession) -> None:
    many, looked = rows_read(session, LONG)
    assert 0.8 * LIMIT < many < 1.2 * LIMIT
    assert looked < 3 * LIMIT < SEEDED / 5, "too many traces are read"


def test_a_long_window_does_not_read_all_its_traces(long: Database) -> None:
    with long.read() as session:
        assert_reads_little(session)


def test_a_short_window_reads_each_of_its_requests(long: Database) -> None:
    hour = replace(LONG, until=LONG.since + timedelta(hours=1))
    with long.read() as session:
        many = raw(session, hour)
        assert 0 < many < LIMIT
        assert rows_read(session, hour)[0] == many


def _counted_from_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "answered", raw)


def _load_summed_from_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests._LOAD.replace("service_s = 'NaN'", "service_s > 0")
    monkeypatch.setattr(requests, "_LOAD", asked)


def _whole_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_DRAWN", f"hashtext(assignment_key) & 1023 < {1024 * LIMIT // SEEDED}")


@pytest.mark.parametrize("fault", [_counted_from_traces, _load_summed_from_traces, _whole_conversations])
def test_reading_all_of_them_would_show(
    long: Database, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    fault(monkeypatch)
    with long.read() as session, pytest.raises(AssertionError, match="too many"):
        assert_reads_little(session)


def assert_fair(session: ReadSession) -> None:
    """Of each class, arm, version, replica and part of the day, and of long and short requests, as many as there are:
    within five standard errors."""
    found = requests.sample(session, LONG, LIMIT)
    assert found.trace_id == requests.sample(session, LONG, LIMIT).trace_id
    chosen = {*found.trace_id}
    columns = "traffic_class, arm, policy_version, replica_id, extract(hour FROM started_at), e2e_s > 1, trace_id"
    rows = session.execute(text(f"SELECT {columns} FROM traces WHERE status = 'ok'")).all()
    for column in range(len(rows[0]) - 1):
        for value in {row[column] for row in rows}:
            inside = [row[-1] in chosen for row in rows if row[column] == value]
            expected = found.share * len(inside)
            assert abs(sum(inside) - expected) <= 5 * np.sqrt(expected) + 1, (column, value)


def test_a_sample_is_fair(long: Database) -> None:
    with long.read() as session:
        assert_fair(session)


def _the_earliest(monkeypatch: pytest.MonkeyPatch) -> None:
    first = LONG.since + timedelta(hours=2.5)
    monkeypatch.setattr(requests, "_DRAWN", f"started_at < timestamptz '{first.isoformat()}'")


def _few_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        requests, "_DRAWN", requests._DRAWN + " AND (traffic_class <> 'batch' OR trace_id::text < '01')"
    )


@pytest.mark.parametrize("fault", [_the_earliest, _few_of_a_class])
def test_an_unfair_sample_shows(
    long: Database, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    fault(monkeypatch)
    with long.read() as session, pytest.raises(AssertionError):
        assert_fair(session)
