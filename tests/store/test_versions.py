"""Versions side by side: intervals that cover, a family that stays readable, and who taught whom."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from sqlalchemy import insert, update

from engine.contracts import ProposerKind, RolloutState
from engine.store.database import Database
from engine.store.intervals import FEWEST_BINS, Estimate, difference, quantile_ranks, ratio
from engine.store.members import Members
from engine.store.models import LearningIntakeRow, PolicyLineageRow, PolicyVersionRow, RolloutRow
from engine.store.panels import versions
from engine.store.repositories import genealogy, overview, plans, policies
from engine.store.repositories.overview import Slice
from tests.store.test_rollups import END, START, deltas_only, write
from tests.telemetry.records import record

WHOLE = Slice(START, END)


def covers(bins: int, each: int, spread: float, by_bin: bool, rng: np.random.Generator) -> float:
    """The share of 400 intervals that hold the true ratio of 0.5, when the bins themselves differ by ``spread``."""
    held = 0
    for _ in range(400):
        level = 0.5 + spread * rng.standard_normal(bins)
        requests = level[:, None] + 0.2 * rng.standard_normal((bins, each))
        over = requests.sum(1) if by_bin else requests.ravel()
        found = ratio(over, np.full(over.shape, each if by_bin else 1))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.5 <= found.high
    return held / 400


def test_the_interval_of_a_ratio_covers_where_requests_of_a_bin_are_alike() -> None:
    assert covers(12, 50, 0.1, True, np.random.default_rng(0)) > 0.92
    assert covers(12, 50, 0.1, False, np.random.default_rng(0)) < 0.7, "the planted fault: requests as the unit"


def test_few_bins_have_a_value_and_no_interval() -> None:
    assert ratio([1.0, 3.0], [2.0, 2.0]) == Estimate(1.0)
    assert ratio([], []) is None
    assert ratio([1.0], [0.0]) is None


@pytest.mark.parametrize(("q", "n"), [(0.5, 40), (0.95, 300)])
def test_the_ranks_of_a_percentile_bound_it_nineteen_times_in_twenty(q: float, n: int) -> None:
    ranks = quantile_ranks(q, n)
    assert ranks is not None
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(500):
        low, high = np.quantile(rng.random(n), ranks, method="lower")
        held += low <= q <= high
    assert 0.9 < held / 500 < 0.99


def test_a_percentile_of_few_requests_has_no_interval() -> None:
    assert quantile_ranks(0.95, 40) is None
    assert quantile_ranks(0.5, 0) is None


def test_bins_that_are_all_alike_have_no_interval() -> None:
    """No errors in any minute is no proof that there will be none: nothing is certain for it."""
    for over in ([0.0] * 40, [1.0] * FEWEST_BINS, [0.1] * 7):
        alike = ratio(over, [2.0] * len(over))
        assert alike is not None
        assert (alike.low, alike.high) == (None, None)


def test_a_difference_to_something_without_an_interval_has_none() -> None:
    for known_of_one in (Estimate(2.0), Estimate(2.0, 2.0, 2.0)):
        assert difference(Estimate(5.0, 4.0, 6.0), known_of_one) == Estimate(3.0)
        assert difference(known_of_one, Estimate(5.0, 4.0, 6.0)) == Estimate(-3.0)


def test_a_percentile_is_known_to_its_bucket_and_no_better(db: Database, tmp_path: Path) -> None:
    """A thousand requests that took the same time, as far as a bucket tells: the bounds are its edges."""
    same = [record(n, started_at=START + timedelta(seconds=n), e2e_s=0.99) for n in range(400)]
    write(db, tmp_path, same)
    with db.read() as session:
        for row in versions.measured(session, WHOLE):
            assert row["e2e_p50_low"] < row["e2e_p50"] < row["e2e_p50_high"]
            assert row["e2e_p50_low"] <= 985.0 < 995.0 <= row["e2e_p50_high"]


def test_a_difference_keeps_skewed_intervals_and_wants_both() -> None:
    found = difference(Estimate(5.0, 4.0, 9.0), Estimate(2.0, 1.0, 3.0))
    assert (found.value, found.low, found.high) == (3.0, 3.0 - 2**0.5, 3.0 + 17**0.5)
    assert difference(Estimate(5.0, 4.0, 6.0), Estimate(2.0)) == Estimate(3.0)


def test_measured_versions_have_intervals_around_their_values(db: Database, tmp_path: Path) -> None:
    deltas_only(db, tmp_path)
    with db.read() as session:
        rows = versions.measured(session, WHOLE)
        (alone,) = versions.measured(session, replace(WHOLE, version=rows[0]["policy_version"]))
    assert len(rows) > 1
    for row in rows:
        for name in ("acceptance_length", "e2e_p50", "tpot_p50"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"], name
    assert alone["requests"] == rows[0]["requests"]
    assert alone["acceptance_length"] == pytest.approx(rows[0]["acceptance_length"])


def test_some_versions_are_what_each_of_them_is_alone(db: Database, tmp_path: Path) -> None:
    deltas_only(db, tmp_path)
    with db.read() as session:
        one, other = (overview.sums(session, replace(WHOLE, version=number))[0]["requests"] for number in (1, 2))
        (both,) = overview.sums(session, replace(WHOLE, versions=(1, 2)))
        assert both["requests"] == one + other
        assert overview.sums(session, replace(WHOLE, versions=(77,))) == []


def test_of_very_many_versions_those_with_the_most_requests_are_measured(db: Database, tmp_path: Path) -> None:
    """And the ones that are asked for by name."""
    many = [record(n, started_at=START + timedelta(seconds=n), policy_version=1 + min(n, 59)) for n in range(70)]
    write(db, tmp_path, many)
    with db.read() as session:
        part = versions.among(session, WHOLE, most=5, also=(3,))
        assert part.versions is not None
        assert {3, 60} <= set(part.versions)
        assert len(part.versions) == 6
        assert len(versions.measured(session, WHOLE)) == versions.SHOWN
        assert versions.among(session, WHOLE, most=60) == WHOLE


def register(db: Database, parent: int | None = None) -> int:
    with db.write() as session:
        kind = ProposerKind.TRACE_MEMORY
        return policies.register(
            session, digest=uuid4().hex * 2, kind=kind, num_speculative_tokens=4, manifest={}, parent_version=parent
        ).version


def test_a_family_is_the_neighbourhood_and_counts_what_it_leaves_out(db: Database) -> None:
    root = register(db)
    line = [root]
    for _ in range(6):
        line.append(register(db, line[-1]))
    with db.write() as session:
        rows = [
            {"digest": f"{n:064x}", "kind": "trace_memory", "num_speculative_tokens": 4, "manifest": {},
             "parent_version": line[4]}
            for n in range(300)
        ]  # fmt: skip
        session.execute(insert(PolicyVersionRow), rows)
        session.execute(
            update(PolicyVersionRow).where(PolicyVersionRow.version == line[5]).values(retired_at=datetime.now(UTC))
        )
    with db.read() as session:
        kin = {one.version: one for one in genealogy.family(session, line[4], up=2, down=3, children=4)}
        assert genealogy.family(session, 9_999) == []
    assert len(kin) == 2 + 1 + 4 + 1
    assert {line[2], line[3], line[5], line[6]} <= set(kin), "the line that went on is shown"
    assert [kin[v].distance for v in line[2:7]] == [-2, -1, 0, 1, 2]
    assert kin[line[4]].more == 301 - 4
    assert kin[line[5]].is_retired
    assert not kin[line[6]].is_retired


def test_what_became_of_a_version(db: Database) -> None:
    good, bad, idle = (register(db) for _ in range(3))
    with db.write() as session:
        plans.append(session, champion=good, fallback=good, salt="s", actor="t", reason="r")
        for state in (RolloutState.PROMOTED, RolloutState.ROLLED_BACK):
            row = {"name": "n", "spec": {}, "spec_hash": "h", "canary": bad, "champion": good, "actor": "t"}
            session.execute(insert(RolloutRow).values(**row, state=state.value, status={}))
        found = genealogy.fates(session, [good, bad, idle])
    assert found[good] == genealogy.Fate(True, None)
    assert found[bad] == genealogy.Fate(False, RolloutState.ROLLED_BACK), "its newest rollout"
    assert found[idle] == genealogy.Fate(False, None)


def test_training_traffic_names_the_versions_that_served_it(db: Database, tmp_path: Path) -> None:
    served = [record(n, started_at=START + timedelta(seconds=n), policy_version=1 + n % 3 // 2) for n in range(30)]
    write(db, tmp_path, served)
    learner = register(db)
    intake = [
        {"ordinal": n, "trace_id": one.trace_id, "started_at": one.started_at, "written_at": START, "model": "m",
         "tenant": None, "traffic_class": "chat", "request_hash": n, "held_out": False, "position": n,
         "max_tokens": 1}
        for n, one in enumerate(served, start=1)
    ]  # fmt: skip
    members = Members.of(range(1, 31))
    with db.write() as session:
        session.execute(insert(LearningIntakeRow), intake)
        for role in ("train", "gate"):
            session.execute(
                insert(PolicyLineageRow).values(
                    version=learner,
                    role=role,
                    chunks=list(members.chunks),
                    bits=members.bits,
                    window_from=START,
                    window_to=END,
                    classes={},
                )
            )
        assert genealogy.taught_by(session, [learner]) == {learner: {1: 20, 2: 10}}
        # A part is every sixth of them; of the newest five v2 served two.
        assert genealogy.taught_by(session, [learner], most=5) == {learner: {1: 5}}
        assert genealogy.taught_by(session, []) == {}
