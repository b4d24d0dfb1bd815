"""The property the dashboard rests on: sums and percentiles from rollups are those of the raw traces.

The oracle is SQL over ``traces`` and numpy, nothing of ``engine.telemetry.rollup``; faults planted there must show.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from engine.contracts import Objectives, Status, TraceRecord
from engine.settings import TelemetrySettings
from engine.store import histogram
from engine.store.database import Database
from engine.telemetry import rollup
from engine.telemetry.spill import Spill
from engine.telemetry.writer import TraceWriter
from tests.telemetry.records import START, record

KEY = "policy_version, arm, traffic_class, replica_id, generation"
COUNTS = (
    "retries",
    "preemptions",
    "good",
    "prompt_tokens",
    "output_tokens",
    "steps",
    "drafted",
    "accepted",
    "draft_s",
    "verify_s",
    "other_s",
    "cost_s",
    "plain_s",
    "expected_accepted",
    "expected_plain_s",
    "expected_cost_s",
    "e2e_s",
)
RAW = f"""
    SELECT date_trunc('minute', started_at, 'UTC') AS minute, {KEY}, count(*) AS requests,
        count(*) FILTER (WHERE status IN ('error', 'timeout')) AS errors,
        count(*) FILTER (WHERE status = 'cancelled') AS cancelled,
        count(*) FILTER (WHERE retry > 0) AS retries, sum(preemptions) AS preemptions,
        count(*) FILTER (WHERE status = 'ok' AND ttft_s <= 0.1 AND tpot_s <= 0.05) AS good,
        {", ".join(f"sum({name}) AS {name}" for name in COUNTS[3:])},
        coalesce(sum(e2e_s - ttft_s), 0) AS decode_s
    FROM traces GROUP BY 1, {KEY} ORDER BY 1, {KEY}"""
ROLLED = f"""
    SELECT at AS minute, {KEY}, sum(requests) AS requests, sum(errors) AS errors, sum(cancelled) AS cancelled,
        {", ".join(f"sum({name}) AS {name}" for name in COUNTS)}, sum(decode_s) AS decode_s
    FROM {{table}} GROUP BY at, {KEY} ORDER BY at, {KEY}"""
PER_POSITION = """
    SELECT policy_version, position, sum(n) FROM {table}, unnest({column}) WITH ORDINALITY AS at (n, position)
    GROUP BY 1, 2 ORDER BY 1, 2"""


GOAL: dict[str, Any] = {"objective_ttft_s": 0.1, "objective_tpot_s": 0.05}


def requests(seed: int) -> list[TraceRecord]:
    """Of every status, some without a first token, some of classes and replicas that come up rarely."""
    made = [record(n, seed) for n in range(300)]
    made += [record(n, seed, status=Status.TIMEOUT, started_at=START + timedelta(seconds=n)) for n in range(300, 320)]
    refused: dict[str, Any] = {"status": Status.REJECTED, "ttft_s": None, "tpot_s": None, "queue_s": None}
    made += [record(n, seed, traffic_class="unknown", replica_id="replica-1", **refused) for n in range(320, 340)]
    return made


def write(db: Database, folder: Path, seed: int) -> None:
    writer = TraceWriter(db, Spill(folder, 10**8), TelemetrySettings(batch_records=37, batch_delay_s=0.01, **GOAL))
    writer.start()
    for one in requests(seed):
        writer.submit(one)
    writer.close()
    assert writer.stats()["written"] == 340, writer.stats()


def assert_rolled_up(db: Database) -> None:
    with db.read() as session:
        queries = (RAW, ROLLED.format(table="rollup_deltas"))
        raw, rolled = (session.execute(text(query)).mappings().all() for query in queries)
        assert len(raw) == len(rolled) > 20
        named = ("minute", *KEY.split(", "))
        for expected, found in zip(raw, rolled, strict=True):
            assert [found[name] for name in named] == [expected[name] for name in named]
            for name in expected.keys() - set(named):
                assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-9), (name, found, expected)
        for column in ("drafted_per_pos", "accepted_per_pos"):
            parts = (PER_POSITION.format(table=table, column=column) for table in ("traces", "rollup_deltas"))
            positions, summed = (session.execute(text(part)).all() for part in parts)
            assert positions == summed
        for metric in rollup.METRICS:
            value = "1 + accepted / CAST(steps AS float8)" if metric == "acceptance_length" else f"{metric}_s"
            some = "steps > 0" if metric == "acceptance_length" else f"{value} IS NOT NULL"
            durations = session.execute(text(f"SELECT arm, {value} FROM traces WHERE status = 'ok' AND {some}")).all()
            stored = text("SELECT arm, idx, cnt FROM rollup_delta_histograms WHERE metric = :metric")
            buckets = session.execute(stored, {"metric": metric}).all()
            for arm in ("champion", "canary", "control"):
                values = [seconds for of, seconds in durations if of == arm]
                merged = histogram.merge([(idx, cnt) for of, idx, cnt in buckets if of == arm])
                assert sum(merged.values()) == len(values) > 50
                exact = np.quantile(values, (0.0, 0.5, 0.95, 0.99, 1.0), method="lower")
                found_quantiles = histogram.quantiles(merged, (0.0, 0.5, 0.95, 0.99, 1.0))
                np.testing.assert_allclose(found_quantiles, exact, rtol=histogram.ALPHA + 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_rollups_equal_the_raw_traces(db: Database, tmp_path: Path, seed: int) -> None:
    write(db, tmp_path, seed)
    assert_rolled_up(db)


def _a_slow_request_is_good(sums: rollup.Sums, one: TraceRecord) -> None:
    sums.good += one.status is Status.OK


def _timeouts_are_no_errors(sums: rollup.Sums, one: TraceRecord) -> None:
    sums.errors -= one.status is Status.TIMEOUT


def _rejected_are_errors(sums: rollup.Sums, one: TraceRecord) -> None:
    sums.errors += one.status is Status.REJECTED


def _every_attempt_is_a_retry(sums: rollup.Sums, one: TraceRecord) -> None:
    sums.retries += max(one.retry, 1) - (one.retry > 0)


def _bonus_tokens_are_accepted(sums: rollup.Sums, one: TraceRecord) -> None:
    sums.accepted += one.steps


def _the_first_token_is_decoding(sums: rollup.Sums, one: TraceRecord) -> None:
    sums.decode_s += one.ttft_s or 0.0


def _positions_from_the_end(sums: rollup.Sums, one: TraceRecord) -> None:
    sums.accepted_per_pos.reverse()


@pytest.mark.parametrize(
    "fault",
    [
        _a_slow_request_is_good,
        _timeouts_are_no_errors,
        _rejected_are_errors,
        _every_attempt_is_a_retry,
        _bonus_tokens_are_accepted,
        _the_first_token_is_decoding,
        _positions_from_the_end,
    ],
)
def test_a_planted_fault_in_the_sums_shows(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[rollup.Sums, TraceRecord], None]
) -> None:
    add = rollup.Sums.add

    def faulty(sums: rollup.Sums, one: TraceRecord, objectives: Objectives) -> None:
        add(sums, one, objectives)
        fault(sums, one)

    monkeypatch.setattr(rollup.Sums, "add", faulty)
    write(db, tmp_path, 0)
    with pytest.raises(AssertionError):
        assert_rolled_up(db)


def test_a_planted_fault_in_the_buckets_shows(db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bucket too high is 2 %."""
    monkeypatch.setattr(histogram, "bucket", lambda seconds, exact=histogram.bucket: exact(seconds) + 1)
    write(db, tmp_path, 0)
    with pytest.raises(AssertionError):
        assert_rolled_up(db)
