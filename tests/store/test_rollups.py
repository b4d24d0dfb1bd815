"""However far compaction is, a reader of any window finds what the raw traces say; so after a rebuild.

The oracles are SQL over ``traces``, numpy and ddsketch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from ddsketch import DDSketch
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from engine.contracts import ProposerKind, RolloutState, Status, TraceRecord
from engine.ops import upkeep
from engine.settings import TelemetrySettings
from engine.store import histogram
from engine.store.database import Database
from engine.store.panels import traffic
from engine.store.repositories import audit, correctness, drift, overview, policies, rollouts, rollups, traces
from engine.store.repositories.overview import Slice
from engine.store.repositories.traces import Filter
from engine.telemetry.spill import Batch, Spill
from engine.telemetry.writer import TraceWriter
from tests.telemetry.records import START, record
from tests.waiting import until

SETTINGS = TelemetrySettings(objective_ttft_s=0.1, objective_tpot_s=0.05)
END = START + timedelta(hours=58)
WINDOWS = {
    "a few minutes": Slice(START, START + timedelta(minutes=97)),
    "all": Slice(START - timedelta(hours=1), END),
    "ragged": Slice(START + timedelta(minutes=17), END - timedelta(minutes=23)),
    "one class": Slice(START + timedelta(minutes=17), END, traffic_class="code"),
    "one arm and version": Slice(START, END - timedelta(minutes=1), arm="canary", version=2),
    "two days": Slice(START + timedelta(minutes=1), START + timedelta(hours=48, minutes=1)),
    "a replica": Slice(START, END, replica="replica-1"),
}
QS = (0.5, 0.9, 0.95, 0.99, 0.999)
COUNTED = ("requests", "errors", "retries", "preemptions", "good", "output_tokens", "steps", "drafted", "accepted")
SQL = {
    "requests": "count(*)",
    "errors": "count(*) FILTER (WHERE status IN ('error', 'timeout'))",
    "retries": "count(*) FILTER (WHERE retry > 0)",
    "good": "count(*) FILTER (WHERE status = 'ok' AND ttft_s <= 0.1 AND tpot_s <= 0.05)",
}


@cache
def records() -> tuple[TraceRecord, ...]:
    """1,200 requests over fifty-eight hours of four days, of two replicas."""
    made = []
    for number in range(1_200):
        at = START + timedelta(seconds=number * 174, milliseconds=number % 997)
        made.append(record(number, 5, started_at=at, replica_id=f"replica-{number % 2}", preemptions=number % 3))
    return tuple(made)


def write(db: Database, folder: Path, chosen: Sequence[TraceRecord]) -> None:
    writer = TraceWriter(db, Spill(folder, 10**8), SETTINGS)
    for seq, start in enumerate(range(0, len(chosen), 37), start=1):
        writer._transaction(Batch(writer._writer_id, seq, chosen[start : start + 37]))


def deltas_only(db: Database, folder: Path) -> None:
    write(db, folder, records())


def compact(db: Database, now: datetime) -> None:
    while upkeep.compact(db, now):
        pass


def compacted(db: Database, folder: Path) -> None:
    write(db, folder, records())
    compact(db, END + timedelta(hours=1))


def late_and_half(db: Database, folder: Path) -> None:
    """Compacted, then a spill from long ago comes, is compacted too, and more is written since."""
    made = records()
    write(db, folder, made[1::3])
    compact(db, END + timedelta(hours=1))
    write(db, folder, made[0::3])
    compact(db, END - timedelta(hours=15))
    write(db, folder, made[2::3])


def rebuilt(db: Database, folder: Path) -> None:
    late_and_half(db, folder)
    with db.write() as session:
        session.execute(text("UPDATE rollups_hour SET requests = requests + 3, good = 0"))
        session.execute(text("DELETE FROM rollup_histograms_minute WHERE metric = 'e2e'"))
    assert upkeep.rebuild(db, SETTINGS, None, None, lambda line: None) == 1_200


def assert_read_right(db: Database) -> None:
    with db.read() as session:
        for name, part in WINDOWS.items():
            where = "started_at >= :since AND started_at < :until"
            filters = {"traffic_class": part.traffic_class, "arm": part.arm, "policy_version": part.version}
            filters["replica_id"] = part.replica
            given = {key: value for key, value in filters.items() if value is not None}
            where += "".join(f" AND {key} = :{key}" for key in given)
            bound = given | {"since": part.since, "until": part.until}
            totals = ", ".join(f"{SQL.get(key, f'sum({key})')} AS {key}" for key in COUNTED)
            raw = session.execute(text(f"SELECT {totals} FROM traces WHERE {where}"), bound).mappings().one()
            (found,) = overview.sums(session, part)
            assert {key: found[key] for key in COUNTED} == {key: raw[key] for key in COUNTED}, name
            binned = overview.sums(session, part, ("traffic_class",), timedelta(hours=2))
            assert sum(row["requests"] for row in binned) == raw["requests"], name
            places = "unnest(drafted_per_pos, accepted_per_pos) WITH ORDINALITY AS p (d, a, place)"
            by_place = f"SELECT place - 1, sum(d), sum(a) FROM traces, {places} WHERE {where} GROUP BY 1 ORDER BY 1"
            expected = [tuple(map(int, row)) for row in session.execute(text(by_place), bound)]
            positions = [(p["position"], p["drafted"], p["accepted"]) for p in overview.positions(session, part)]
            assert positions == expected, name
            for metric in rollups.METRICS:
                value = "1 + accepted / CAST(nullif(steps, 0) AS float8)"
                value = value if metric == "acceptance_length" else f"{metric}_s"
                query = f"SELECT {value} FROM traces WHERE {where} AND status = 'ok' AND {value} IS NOT NULL"
                values = [row[0] for row in session.execute(text(query), bound)]
                (quantiles,) = overview.quantiles(session, part, metric, QS)
                exact = np.quantile(values, QS, method="lower")
                sketch = DDSketch(relative_accuracy=histogram.ALPHA)
                for one in values:
                    sketch.add(one)
                for q, truth in zip(QS, exact, strict=True):
                    ours, theirs = quantiles[f"q{q * 100:g}"], sketch.get_quantile_value(q)
                    assert abs(ours - truth) <= truth * histogram.ALPHA * 1.001, (name, metric, q)
                    assert abs(ours - theirs) <= theirs * 2.02 * histogram.ALPHA, (name, metric, q)


STATES: list[Callable[[Database, Path], None]] = [deltas_only, compacted, late_and_half, rebuilt]


@pytest.mark.parametrize("state", STATES)
def test_every_window_reads_as_the_raw_traces(
    db: Database, tmp_path: Path, state: Callable[[Database, Path], None]
) -> None:
    state(db, tmp_path)
    assert_read_right(db)
    with db.read() as session:
        assert audit.rolled_up(session) == audit.traces(session) == 1_200


def test_compaction_leaves_one_row_a_key_and_takes_every_delta_once(db: Database, tmp_path: Path) -> None:
    late_and_half(db, tmp_path)
    for _ in range(2):
        compact(db, END + timedelta(hours=1))
        with db.read() as session:
            assert rollups.freshness(session) == rollups.Freshness(0, None)
            for table in (f"rollups_{tier}" for tier in rollups.TIERS):
                assert session.scalar(text(f"SELECT sum(requests) FROM {table}")) == 1_200


def test_a_backlog_is_taken_an_hour_at_a_time(db: Database, tmp_path: Path) -> None:
    """After a day without a compactor no statement is larger than an hour, and the chore comes again at once."""
    write(db, tmp_path, records())
    waits, pieces = 1_200, 0
    more = True
    while more:
        more = upkeep.compact(db, END + timedelta(hours=1))
        with db.read() as session:
            left = rollups.freshness(session).waiting
        assert waits - left <= 3_600 / 174 + 1
        waits, pieces = left, pieces + 1
    assert waits == 0
    assert pieces >= 58
    assert_read_right(db)


def test_rebuilding_waits_for_nobody_and_leaves_days_without_traces_alone(db: Database, tmp_path: Path) -> None:
    compacted(db, tmp_path)
    with db.write() as session:
        session.execute(text(f"DROP TABLE traces_p{START:%Y%m%d}"))
    first, second = START.date(), (START + timedelta(days=1)).date()
    left = upkeep.rebuild(db, SETTINGS, first, None, lambda line: None)
    with db.read() as session:
        before = Slice(START - timedelta(hours=1), datetime(second.year, second.month, second.day, tzinfo=UTC))
        (kept,) = overview.sums(session, before)
    assert kept["requests"] == 1_200 - left > 0


def test_a_day_whose_traces_are_dropped_before_its_turn_keeps_its_rollups(db: Database, tmp_path: Path) -> None:
    compacted(db, tmp_path)
    with db.write() as session:
        before = session.scalar(text("SELECT sum(requests) FROM rollups_day"))
        session.execute(text(f"DROP TABLE traces_p{START:%Y%m%d}"))
    with db.snapshot() as session:
        assert rollups.rebuild(session, START.date(), SETTINGS.objectives) == 0
    with db.read() as session:
        assert session.scalar(text("SELECT sum(requests) FROM rollups_day")) == before


def test_a_batch_written_while_rollups_are_rebuilt_is_counted_once(db: Database, tmp_path: Path) -> None:
    made = records()
    write(db, tmp_path, made[:600])
    with db.snapshot() as session:
        session.execute(text("SELECT 1 FROM traces LIMIT 1"))
        write(db, tmp_path, made[600:])
        for days in range(4):
            rollups.rebuild(session, (START + timedelta(days=days)).date(), SETTINGS.objectives)
    assert_read_right(db)


def _rebuild_during_a_compaction(db: Database, folder: Path) -> int:
    write(db, folder, records())
    with ThreadPoolExecutor(1) as pool:
        with db.write() as session:
            rollups.compact(session, END + timedelta(hours=1))
            made = pool.submit(upkeep.rebuild, db, SETTINGS, None, None, lambda line: None)

            def waits() -> bool:
                with db.read() as other:
                    return bool(other.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))) or made.done()

            until(waits, "the rebuild to wait for the compaction")
        return made.result(60)


def test_rebuilding_waits_for_a_compaction(db: Database, tmp_path: Path) -> None:
    assert _rebuild_during_a_compaction(db, tmp_path) == 1_200
    assert_read_right(db)


def test_a_rebuild_that_takes_no_turn_is_overtaken(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollups, "turn", lambda database: nullcontext())
    with pytest.raises(DBAPIError, match="concurrent"):
        _rebuild_during_a_compaction(db, tmp_path)


def _old_windows(db: Database) -> None:
    """Windows that begin, or lie, where only hours are left: each request of the whole hours is there once."""
    starts = [one.started_at for one in records()]
    for since, stop in (
        (START + timedelta(minutes=17), END),
        (START + timedelta(minutes=17), START + timedelta(hours=3, minutes=12)),
        (START + timedelta(hours=20, minutes=40), END - timedelta(minutes=23)),
        (END - timedelta(hours=8, minutes=3), END - timedelta(minutes=23)),
    ):
        old, old_end = (at < datetime(2026, 3, 3, tzinfo=UTC) for at in (since, stop))
        begin = since.replace(minute=0) if old else since
        end = stop.replace(minute=0) + timedelta(hours=1) if old_end else stop
        expected = sum(begin <= at < end for at in starts)
        with db.read() as session:
            part = Slice(since, stop)
            (whole,) = traffic.totals(session, part)
            bins = traffic.over_time(session, part, latencies=("e2e",), now=END + timedelta(days=1))
            heat = traffic.heat(session, part)
            ended = sum(one.status is Status.OK and begin <= one.started_at < end for one in records())
        assert whole["requests"] == expected
        assert whole["requests_s"] == pytest.approx(expected / (end - begin).total_seconds())
        shown = sum(row["requests"] for row in bins)  # a bin that has hardly begun is left out at the end
        assert expected - 20 * (not old_end) <= shown <= expected
        assert sum(row["requests"] for row in heat) == ended
        assert not old or bins[0]["width_s"] >= 3_600
        assert bins[0]["e2e_p95"] is not None


def retained_by_the_hour(db: Database, folder: Path) -> None:
    compacted(db, folder)
    upkeep.keep_partitions(db, TelemetrySettings(retention_days=1), END)
    with db.read() as session:
        assert session.scalar(text("SELECT min(at) FROM rollups_minute")) >= datetime(2026, 3, 3, tzinfo=UTC)
        assert session.scalar(text("SELECT min(at) FROM rollups_ten_minutes")) >= datetime(2026, 3, 3, tzinfo=UTC)


def test_a_window_older_than_the_finer_rollups_is_told_by_the_hour(db: Database, tmp_path: Path) -> None:
    retained_by_the_hour(db, tmp_path)
    _old_windows(db)
    with db.read() as session:  # what can be listed is what is kept
        part = Slice(START, END)
        assert traces.matching(session, part, Filter()) == (len(traces.listed(session, part, limit=2_000)), True)


def test_without_it_they_lack_what_only_hours_hold(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retained_by_the_hour(db, tmp_path)
    monkeypatch.setattr(overview, "resolved", lambda session, part: part)
    with pytest.raises((AssertionError, ValueError)):
        _old_windows(db)


def _hours_overlap_the_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    right = overview._cover

    def wrong(since: datetime, until: datetime, tiers: Any) -> Any:
        return [(t, b - timedelta(hours=1) if t == "hour" else b, e) for t, b, e in right(since, until, tiers)]

    monkeypatch.setattr(overview, "_cover", wrong)


def _deltas_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "_SUMS", (overview._SUMS[0], "(SELECT * FROM rollup_deltas LIMIT 0) AS none"))


def _the_next_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    right = histogram.table

    def wrong(*arguments: Any) -> histogram.Table:
        return replace(right(*arguments), first=right(*arguments).first + 1)

    monkeypatch.setattr(histogram, "table", wrong)


@pytest.mark.parametrize("fault", [_hours_overlap_the_minutes, _deltas_are_forgotten, _the_next_bucket])
def test_a_planted_fault_in_reading_shows(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    late_and_half(db, tmp_path)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        assert_read_right(db)


def test_a_planted_fault_in_compaction_shows(db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollups, "_COMPACT_SUMS", rollups._COMPACT_SUMS.replace("+ excluded.good", ""))
    late_and_half(db, tmp_path)
    with pytest.raises(AssertionError):
        assert_read_right(db)


def test_old_hours_and_batches_are_forgotten(db: Database, tmp_path: Path) -> None:
    compacted(db, tmp_path)
    now = datetime.now(UTC)
    upkeep.keep_partitions(db, TelemetrySettings(rollup_retention_days=1, retention_days=1), now + timedelta(days=400))
    with db.read() as session:
        for table in ("rollups_hour", "rollup_histograms_day", "rollups_ten_minutes", "trace_batches"):
            assert session.scalar(text(f"SELECT count(*) FROM {table}")) == 0


def test_findings_that_ended_long_ago_are_forgotten_and_what_is_still_true_is_not(db: Database) -> None:
    def finding(kind: str) -> drift.Finding:
        return drift.Finding(kind, "class mix", None, None, START, END, START, END, 0.3, 0.3, 0.1, 100, kind)

    with db.write() as session:
        drift.record(session, [finding("input"), finding("slow_slide")], START)
        drift.record(session, [finding("slow_slide")], END)  # ends the first
    upkeep.keep_partitions(db, TelemetrySettings(rollup_retention_days=5), END + timedelta(days=4))
    with db.read() as session:
        assert len(drift.findings(session, START, END + timedelta(days=9))) == 2
    upkeep.keep_partitions(db, TelemetrySettings(rollup_retention_days=5), END + timedelta(days=6))
    with db.read() as session:
        (left,) = drift.findings(session, START, END + timedelta(days=9))
    assert left["kind"] == "slow_slide"


def test_audits_and_their_evidence_are_kept_as_long_as_the_longest_rollups(db: Database) -> None:
    counts = correctness.AuditCounts(1, 2, "canary", "chat", 9, 90, 0, 1)
    evidence = correctness.Mismatch(uuid4(), START, "replica-0", 2, "canary", 1, "chat", 3, 7, 8, 1.0, 0.1)
    with db.write() as session:
        correctness.write(session, uuid4(), "replica-0", [counts], [evidence])
    for days, left in ((4, 1), (6, 0)):
        now = datetime.now(UTC) + timedelta(days=days)
        upkeep.keep_partitions(db, TelemetrySettings(rollup_retention_days=5), now)
        with db.read() as session:
            for table in ("output_audits", "output_mismatches"):
                assert session.scalar(text(f"SELECT count(*) FROM {table}")) == left


def test_a_rebuild_keeps_no_rollout_from_starting(db: Database) -> None:
    """Both take an advisory lock, and the two must not be the same."""
    with rollups.turn(db), db.write() as session:
        session.execute(text("SET LOCAL lock_timeout = '1ms'"))
        made = [
            policies.register(session, digest=kind, kind=ProposerKind.NGRAM, num_speculative_tokens=4, manifest={})
            for kind in ("a", "b")
        ]
        rollouts.create(
            session, name="n", spec={}, spec_hash="h", canary=made[1].version, champion=made[0].version, actor="t",
            state=RolloutState.READY, status={}, created_at=START,
        )  # fmt: skip
