"""What the benchmark of the store stands on: made-up days are like written ones, and its ingest loses nothing."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import numpy as np
import pytest
from sqlalchemy import text

from engine.bench import ingest, seeded
from engine.bench.store import Timing, panel_figures
from engine.ops import upkeep
from engine.rollout.replay import replay
from engine.settings import TelemetrySettings
from engine.store.database import Database, ReadSession
from engine.store.repositories import (
    audit,
    compared,
    evidence,
    overview,
    partitions,
    policies,
    rollouts,
    rollups,
    seeding,
)
from engine.telemetry.writer import TraceWriter

DAY = date(2026, 3, 1)
INDEXES = "SELECT count(*) FROM pg_indexes WHERE tablename = :table"


def test_a_seeded_day_is_a_partition_like_any_other(db: Database) -> None:
    until = datetime(2026, 4, 1, tzinfo=UTC)
    for seed, traces in ((0.1, 300), (0.2, 200)):
        with db.write() as session:
            seeding.add_day(session, DAY, 4, traces, until, seed)
    assert upkeep.rebuild(db, TelemetrySettings(), DAY, DAY, lambda line: None) == 500
    with db.read() as session:
        assert audit.traces(session) == 500
        assert audit.doubled(session) == audit.rollup_differences(session) == 0
        here, parent = (session.scalar(text(INDEXES), {"table": t}) for t in (partitions.name("traces", DAY), "traces"))
        assert here == parent


def test_nobody_compacts_or_rebuilds_while_a_day_changes_its_partition(db: Database) -> None:
    with db.write() as session:
        seeding.add_day(session, DAY, 4, 10, datetime(2026, 4, 1, tzinfo=UTC), 0.1)
        with db.write() as other, pytest.raises(rollups.Busy):
            rollups.compact(other, datetime(2026, 4, 1, tzinfo=UTC))
    with db.write() as other:
        assert not rollups.compact(other, datetime(2026, 4, 1, tzinfo=UTC))


def test_made_up_compared_requests_are_counted_like_served_ones(db: Database) -> None:
    with db.write() as session:
        seeding.add_compared(session, DAY, 7, 400, 0.1)
    window = compared.Window(7, datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 3, 1, tzinfo=UTC))
    with db.write() as session:
        assert compared.take_in(session, [window], datetime(2026, 3, 3, tzinfo=UTC)) is None
    with db.read() as session:
        found = {(s.arm, s.traffic_class): s for s in evidence.segments(session, [window])}
    assert len(found) == 10
    assert {s.requests for (_, name), s in found.items() if name is None} == {200}
    assert {s.keys for (_, name), s in found.items() if name is None} == {50}


def test_a_database_that_is_full_is_filled_no_further(db: Database) -> None:
    said = list[str]()
    seeded.top_up(db, TelemetrySettings(), 600, datetime.now(UTC), 0, said.append)
    with db.read() as session:
        newest = overview.newest(session)
    assert newest is not None
    seeded.top_up(db, TelemetrySettings(), 600, newest + timedelta(minutes=1), 0, said.append)
    with db.read() as session:
        there = audit.traces(session)
        assert there >= 0.95 * 600
        assert max(policies.numbers(session)) == seeding.NEWEST
        assert [one.canary for one in rollouts.list_rollouts(session)] == [8, 7, 6, 5, 4, 3]
        states = [one.state.value for one in rollouts.list_rollouts(session)][1:]
        assert set(states) == {"DONE", "ROLLED_BACK"}
        assert replay_all(session) == []
    assert said[-1] == f"{there:,} traces are there already"
    assert sum("seeded" in line for line in said) == 1


def replay_all(session: ReadSession) -> list[object]:
    """What the decisions that were written down would be, made again, where that is something else."""
    found = rollouts.list_rollouts(session)
    made = [replay(one, rollouts.decisions(session, one.id)) for one in found]
    return [wrong for one in made for wrong in (*one.differing, *one.unreadable)]


def test_a_panel_without_rows_does_not_make_the_others_cheap() -> None:
    def timed(panel: str, ms: float, rows: int) -> Timing:
        return Timing(panel, "1h", False, ms, rows)

    before = [timed("full", 10.0, 5), timed("empty", 1.0, 0), timed("later", 1.0, 0)]
    after = [timed("full", 20.0, 5), timed("empty", 1.0, 0), timed("later", 20.0, 3)]
    p95, _, growth = panel_figures(before, after, np.random.default_rng(0))
    assert (p95.value, p95.n) == (20.0, 2)
    assert (growth.value, growth.n) == (2.0, 1)
    assert len(panel_figures([], after, np.random.default_rng(0))) == 2


def _ingest(db: Database) -> dict[str, float]:
    figures = ingest.measure(db, 200, 0.5, np.random.default_rng(0), lambda line: None)
    return {figure.name: figure.value for figure in figures}


def test_ingest_counts_what_is_stored(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "PROBES", 2)
    found = _ingest(db)
    assert found["ingest_lost"] == 0
    assert found["ingest_per_s"] > 0
    assert found["visible_after_s_p95"] > 0
    monkeypatch.setattr(TraceWriter, "submit", loses_every_tenth(TraceWriter.submit))
    assert _ingest(db)["ingest_lost"] > 0


def loses_every_tenth(submit: object) -> object:
    sent = [0]

    def lossy(writer: TraceWriter, record: object) -> None:
        sent[0] += 1
        if sent[0] % 10 or getattr(record, "traffic_class", "").startswith("probe"):
            submit(writer, record)  # type: ignore[operator]

    return lossy
