"""Every panel answers on an empty database and on a full one, and comes out in every format."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import pandas as pd
import pytest

from engine.contracts import Status
from engine.diagnosis import explain
from engine.store import frames
from engine.store.database import Database, ReadSession
from engine.store.panels import PANELS
from engine.store.repositories import learning, overview, traces
from engine.store.repositories.learning import Attempt
from engine.store.repositories.overview import Slice
from engine.store.repositories.traces import Filter, Place
from tests.store.test_rollups import END, START, compact, compacted, deltas_only, records, write
from tests.telemetry.records import record

ALL = Filter()
DAY = Slice(START, START + timedelta(days=1))


def test_every_panel_on_nothing_and_on_everything(db: Database, tmp_path: Path) -> None:
    with db.read() as session:
        for panel in PANELS.values():
            assert isinstance(panel.read(session, DAY), list), panel.name
    deltas_only(db, tmp_path)
    with db.read() as session:
        for panel in PANELS.values():
            rows = panel.read(session, Slice(START, END))
            for form in frames.FORMATS:
                assert frames.encode(rows, form, {"panel": panel.name}), (panel.name, form)
        (totals,) = PANELS["overview.totals"].read(session, Slice(START, END))
    assert totals["requests"] == 1_200
    assert totals["goodput_share"] == pytest.approx(totals["good"] / 1_200)
    assert totals["e2e_p50"] < totals["e2e_p90"] < totals["e2e_p95"] < totals["e2e_p99"] <= totals["e2e_p99.9"]


def test_every_percentile_is_there_by_version_class_arm_and_replica(db: Database, tmp_path: Path) -> None:
    """The queue's too; with goodput, retries and preemptions."""
    deltas_only(db, tmp_path)
    wanted = [f"{metric}_p{q}" for metric in ("ttft", "tpot", "e2e", "queue") for q in ("50", "90", "95", "99", "99.9")]
    names = {"versions": "policy_version", "classes": "traffic_class", "arm_totals": "arm", "replicas": "replica_id"}
    with db.read() as session:
        (whole,) = PANELS["overview.totals"].read(session, Slice(START, END))
        for name, by in names.items():
            rows = PANELS[f"overview.{name}"].read(session, Slice(START, END))
            assert len({row[by] for row in rows}) == len(rows) > 1, name
            for row in rows:
                assert all(row[column] > 0 for column in wanted), name
                assert {"goodput_s", "goodput_share", "retry_rate", "error_rate"} <= row.keys()
            for column in ("requests", "retries", "preemptions", "good"):
                assert sum(row[column] for row in rows) == whole[column] > 0, (name, column)


@pytest.mark.parametrize("compaction", [False, True])
def test_the_gain_that_was_predicted_stands_beside_the_one_observed(
    db: Database, tmp_path: Path, compaction: bool
) -> None:
    """What an engine of before wrote says nothing of the first."""
    same = {"started_at": START, "policy_version": 2, "traffic_class": "chat", "steps": 4, "drafted": 9}
    known = record(1, **same, cost_s=2.0, plain_s=4.0, expected_cost_s=1.0, expected_plain_s=3.0)
    before = record(2, **same, cost_s=2.0, plain_s=2.0, expected_cost_s=0.0, expected_plain_s=0.0)
    for chosen, predicted, observed in (([before], None, 1.0), ([known], 3.0, 1.5)):
        write(db, tmp_path, chosen)
        if compaction:
            compact(db, START + timedelta(days=2))
        with db.read() as session:
            (row,) = PANELS["speculation.cost"].read(session, DAY)
        assert (row["predicted_gain"], row["observed_gain"]) == (predicted, observed)


def test_the_formats_say_the_same_and_json_knows_no_nan() -> None:
    rows = [{"at": START, "value": 1.5, "list": [1, 2]}, {"at": START, "value": float("nan"), "list": []}]
    found = json.loads(frames.encode(rows, "json", {"since": START}))
    assert found["rows"][1]["value"] is None
    assert found["since"] == START.isoformat()
    table = pd.read_csv(io.BytesIO(frames.encode(rows, "csv")))
    whole = pd.read_parquet(io.BytesIO(frames.encode(rows, "parquet")))
    assert list(table.columns) == list(whole.columns) == ["at", "value", "list"]
    assert table["list"][0] == whole["list"][0] == "[1, 2]"
    with pytest.raises(ValueError, match="csv"):
        frames.encode(rows, "xlsx")


def test_an_old_window_still_has_its_attempts(db: Database) -> None:
    """However many the learner has made since."""
    with db.write() as session:
        for number in range(250):
            at = START + timedelta(hours=number)
            learning.record(session, Attempt(at, at, "refused", "no certain gain", 60, 20, {}, 0.1))
    with db.read() as session:
        rows = PANELS["system.learning"].read(session, DAY)
        events = explain._events(session, START, START + timedelta(hours=3))
    assert [row["at"] for row in rows] == [START + timedelta(hours=n) for n in reversed(range(24))]
    assert [event.at for event in events] == [START + timedelta(hours=n) for n in range(3)]


def test_a_timeout_is_a_failure_too(db: Database, tmp_path: Path) -> None:
    ends = ("ok", "error", "timeout", "cancelled")
    write(db, tmp_path, [record(n, 5, started_at=START, status=end) for n, end in enumerate(ends)])
    with db.read() as session:
        assert {row["status"] for row in PANELS["traces.failed"].read(session, DAY)} == {"error", "timeout"}


def test_a_cell_of_a_client_is_no_formula() -> None:
    rows = [{"tenant": text, "effect": -1.5} for text in ("=HYPERLINK(1)", "+1", "-1", "@x", "plain")]
    table = pd.read_csv(io.BytesIO(frames.encode(rows, "csv")))
    assert list(table["tenant"]) == ["'=HYPERLINK(1)", "'+1", "'-1", "'@x", "plain"]
    assert list(table["effect"]) == [-1.5] * 5


def walk(session: ReadSession, order: str, chosen: Filter, size: int, back: bool = False) -> list[list[UUID]]:
    """Every page of a list, one after the other; or from the last one back."""
    key, found, place = {"newest": "started_at", "slowest": "e2e_s"}[order], list[list[UUID]](), None
    if back:
        place = Place(START if order == "newest" else 0.0, UUID(int=0), 0, back=True)
    while rows := traces.listed(session, Slice(START, END), chosen, order, size, place):
        found.append([row["trace_id"] for row in rows])
        edge = rows[0] if back else rows[-1]
        place = Place(edge[key], edge["trace_id"], size * len(found), back)
    return found


@pytest.mark.parametrize("order", ["newest", "slowest"])
@pytest.mark.parametrize("chosen", [Filter(), Filter(tenant="acme")], ids=["all", "a tenant"])
def test_traces_come_by_pages_without_a_hole(db: Database, tmp_path: Path, order: str, chosen: Filter) -> None:
    """Whichever way one goes, and where many rows have the value that the list is sorted by."""
    tied = [replace(one, e2e_s=1.5, started_at=one.started_at.replace(minute=0, second=0, microsecond=0))
            for one in records()[::2]]  # fmt: skip
    write(db, tmp_path, [*tied, *records()[1::2]])
    with db.read() as session:
        whole = [row["trace_id"] for row in traces.listed(session, Slice(START, END), chosen, order, 2_000)]
        assert len(set(whole)) == len(whole) == traces.matching(session, Slice(START, END), chosen)[0] > 300
        assert [one for page in walk(session, order, chosen, 97) for one in page] == whole
        assert [one for page in reversed(walk(session, order, chosen, 97, back=True)) for one in page] == whole


@pytest.mark.parametrize("kept", [deltas_only, compacted])
def test_a_list_in_a_window_inside_minutes_counts_what_it_holds(
    db: Database, tmp_path: Path, kept: Callable[[Database, Path], None]
) -> None:
    """A rollup lies at the start of its minute, and a window may begin or end within one."""
    kept(db, tmp_path)
    first = min(one.started_at for one in records())
    with db.read() as session:
        for since, length in itertools.product((-1, 20, 5_000.25), (3, 61, 40_000.125)):
            begin = first + timedelta(seconds=since)
            part = Slice(begin, begin + timedelta(seconds=length))
            many = len(traces.listed(session, part, limit=2_000))
            assert traces.matching(session, part, Filter()) == (many, True), (since, length)
            of_class = replace(part, traffic_class="code")
            assert traces.matching(session, of_class, Filter())[0] == len(traces.listed(session, of_class, limit=2_000))


def test_a_list_is_of_what_was_asked_for(db: Database, tmp_path: Path) -> None:
    deltas_only(db, tmp_path)
    asked = (
        Filter(status="error"), Filter(tenant="acme"), Filter(min_s=1.0, max_s=2.0), Filter(latency="tpot", min_s=0.02),
        Filter(min_length=1.5, max_length=2.5), Filter(min_output=12), Filter(replica="replica-1"),
        Filter(preempted=True), Filter(retried=True),
    )  # fmt: skip
    part = Slice(START, END)
    with db.read() as session:
        times = [row["e2e_s"] for row in traces.listed(session, part, order="slowest", limit=1_200)]
        assert times == sorted(times, reverse=True)
        for chosen in asked:
            listed = traces.listed(session, part, chosen, limit=1_200)
            assert (len(listed), True) == traces.matching(session, part, chosen)
            assert 0 < len(listed) < 1_200, chosen
        one = listed[0]["trace_id"]
        assert [r["trace_id"] for r in traces.listed(session, part, Filter(trace_ids=(one,)))] == [one]
        lengths = [1 + row["accepted"] / row["steps"] for row in traces.listed(session, part, asked[4], limit=1_200)]
        assert all(1.5 <= length < 2.5 for length in lengths)
        assert traces.listed(session, part, Filter(generation=10**6)) == []
        assert traces.listed(session, part, Filter(finish_reason="nonsense")) == []


def _slowest(db: Database, part: Slice, chosen: Filter = ALL) -> None:
    """The first page of the slowest, against a sort of everything."""
    with db.read() as session:
        page = traces.listed(session, part, chosen, order="slowest", limit=20)
        everything = traces.listed(session, part, chosen, limit=5_000)
    times = sorted((row["e2e_s"] for row in everything), reverse=True)
    assert [row["e2e_s"] for row in page] == times[:20]


def test_the_slowest_are_those_of_every_class(db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that failed too, though histograms do not know them, and those of a class that only failed."""
    deltas_only(db, tmp_path)
    later = START + timedelta(seconds=20)
    slow = [record(n, 9, started_at=later, status=Status.ERROR, traffic_class="odd", e2e_s=900.0 + n) for n in range(3)]
    write(db, tmp_path, slow)
    for part in (
        Slice(START, END),
        Slice(START, END, "code"),
        Slice(START, END, arm="canary"),
        Slice(START, END, "odd"),
    ):
        _slowest(db, part)
    _slowest(db, Slice(START, END), Filter(min_s=1.0))
    _slowest(db, Slice(later, later + timedelta(seconds=20)), Filter(min_s=1.0))  # no minute begins in it
    monkeypatch.setattr(overview, "known", lambda session, part: {"classes": ["chat", "code"]})
    with pytest.raises(AssertionError):
        _slowest(db, Slice(START, END))


@pytest.mark.parametrize("hours", [1, 7, 30, 200])
def test_a_window_is_covered_once(hours: int) -> None:
    part = Slice(START + timedelta(minutes=7), START + timedelta(hours=hours, minutes=3))
    for width in (None, timedelta(minutes=1), timedelta(minutes=30), timedelta(hours=2), timedelta(days=1)):
        pieces = part.covered_by(width)
        assert pieces[0][1] == part.since
        assert pieces[-1][2] == part.until
        assert all(end == begin for (_, _, end), (_, begin, _) in pairwise(pieces))
        assert len(pieces) <= 7
