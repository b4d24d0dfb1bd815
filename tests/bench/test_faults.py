"""Planted faults are what they claim and exist nowhere else; the figures say what the ledger and the traces say."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from sqlalchemy import text

from engine.bench import faults, planted
from engine.bench.planted import SAYS, SLOW_S, Fault, Planted
from engine.contracts import RolloutState, SamplingParams, SlipstreamError, Status, artifact_digest
from engine.model.loading import Target
from engine.rollout.controller import Controller
from engine.rollout.launch import launch
from engine.runner.engine import Engine, EngineRequest, RequestResult
from engine.speculation.artifact import load_proposer
from engine.speculation.none import NoneProposer
from engine.speculation.proposer import PolicyError
from engine.store.database import Database
from engine.store.repositories import rollouts
from tests.rollout import database_world as world

PROMPT = (5, 9, 5, 9, 5, 9, 30, 31)
NONE, CHAMPION, TRIED = 1, 2, 3


def proposer(fault: Fault) -> Planted:
    files = planted.files(fault)
    with planted.planted():
        made = load_proposer(files, artifact_digest(files), None)
    assert isinstance(made, Planted)
    return made


def served(target: Target, fault: Fault | None, sleep: list[float] | None = None) -> RequestResult:
    """A greedy request of this policy; plain decoding without one."""
    engine = Engine(target, max_num_seqs=2, max_model_len=64)
    if fault is not None:
        note = (sleep if sleep is not None else []).append
        engine.load(1, replace(proposer(fault), sleep=note))
    else:
        engine.load(1, NoneProposer())
    engine.add(EngineRequest("r", PROMPT, SamplingParams(16, ignore_eos=True), 1))
    while engine.has_work:
        for output in engine.step():
            if output.result is not None:
                return output.result
    raise AssertionError("no result")


@pytest.mark.parametrize("fault", Fault)
def test_no_other_engine_loads_a_planted_policy(fault: Fault) -> None:
    files = planted.files(fault)
    with pytest.raises(PolicyError, match="no setting 'fault'"):
        load_proposer(files, artifact_digest(files), None)


def test_a_planted_draft_changes_no_token(tiny: Target) -> None:
    plain, slept = served(tiny, None), list[float]()
    found = {fault: served(tiny, fault, slept) for fault in (Fault.SLOW, Fault.GARBAGE, Fault.THROWS)}
    assert {result.payload.output_ids for result in found.values()} == {plain.payload.output_ids}
    assert all(result.status is Status.OK for result in found.values())
    assert found[Fault.THROWS].draft_errors == 14  # every verify step but the last, which has no room for a draft
    assert found[Fault.SLOW].draft_errors == found[Fault.GARBAGE].draft_errors == 0
    assert set(slept) == {SLOW_S}
    assert found[Fault.GARBAGE].counts.drafted > 20
    assert found[Fault.GARBAGE].counts.accepted < 3


def test_the_engine_that_fails_does_so_for_that_policy_alone(tiny: Target) -> None:
    engine = Engine(tiny, max_num_seqs=2, max_model_len=64)
    with planted.planted():
        engine.load(1, proposer(Fault.GARBAGE))
        engine.load(2, proposer(Fault.FAILS))
        engine.add(EngineRequest("sound", PROMPT, SamplingParams(4), 1))
        with pytest.raises(RuntimeError, match=SAYS):
            engine.add(EngineRequest("failing", PROMPT, SamplingParams(4), 2))
    assert engine.stats()["waiting"] == 1


def test_a_fault_that_there_is_not() -> None:
    with pytest.raises(SlipstreamError, match="no fault 'slowly'; there are slow, garbage, throws, fails"):
        faults._fault("slowly")


@pytest.fixture
def rolled_back(db: Database) -> int:
    """A rollout that its guards took back, and some requests of the champion after it."""
    now, rng = datetime.now(UTC), np.random.default_rng(0)
    world.versions(db, 3)
    world.first_plan(db, CHAMPION, NONE)
    world.beat(db, now, (NONE, CHAMPION, TRIED))
    made, acting = launch(db, canary=TRIED, actor="bench", preset="fast", now=now), Controller(db, "c", 15.0)
    for _ in range(40):
        now += timedelta(seconds=5)
        world.beat(db, now, (NONE, CHAMPION, TRIED))
        world.serve(db, rng, now, 40, {NONE: 0.0, CHAMPION: 1.0, TRIED: 0.1})
        acting.tick(now)
        with db.read() as session:
            found = rollouts.get(session, made.id)
        if found is not None and found.state is RolloutState.ROLLED_BACK:
            return made.id
    raise AssertionError("never rolled back")


def test_the_figures_are_those_of_the_record(db: Database, rolled_back: int) -> None:
    with db.read() as session:
        one = faults.outcome(session, Fault.GARBAGE, rolled_back)
        rows = session.execute(text("SELECT started_at, e2e_s FROM traces WHERE policy_version = 3")).all()
        beyond = faults.beyond(session, failed=0, sent=400)
    figures = {figure.name.partition(":")[0]: figure.value for figure in faults.of_fault(one)}
    assert figures["rolled_back"] == 1
    assert figures["canary_requests"] == len(rows) > 0
    assert figures["canary_after_rollback"] == figures["failed_drafts"] == beyond.value == 0
    last, first = max(at for at, _ in rows), min(at + timedelta(seconds=e2e) for at, e2e in rows)
    assert figures["evidence_to_last_canary"] == pytest.approx((last - first).total_seconds())
    assert one.judged is not None
    assert figures["decision_to_last_canary"] == pytest.approx((last - one.judged.decided_at).total_seconds())
    assert faults.said(one).startswith("garbage: ROLLED_BACK by tokens_per_step in all")


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ("UPDATE traces SET generation = 99 WHERE policy_version = 3", "canary_after_rollback", None),
        ("UPDATE traces SET draft_errors = 2 WHERE policy_version = 3", "failed_drafts", None),
        ("DELETE FROM rollout_decisions WHERE verdict = 'FAIL'", "rolled_back", 0),
        ("UPDATE rollout_decisions SET command_id = 1 WHERE verdict = 'FAIL'", "rolled_back", 0),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_record_is_in_the_figures(
    db: Database, rolled_back: int, change: str, name: str, value: int | None
) -> None:
    with db.write() as session:
        session.execute(text(change))
    with db.read() as session:
        one = faults.outcome(session, Fault.GARBAGE, rolled_back)
    figures = {figure.name: figure.value for figure in faults.of_fault(one)}
    assert figures[f"{name}:garbage"] == (one.served.requests if value is None else value)


def test_a_failure_that_nobody_planted_counts(db: Database, rolled_back: int) -> None:
    def failing(words: str) -> float:
        with db.write() as session:
            session.execute(text("UPDATE traces SET status = 'error', error = :words WHERE policy_version = 3"),
                            {"words": words})  # fmt: skip
        with db.read() as session:
            return faults.beyond(session, failed=0, sent=400).value

    assert failing(f"RuntimeError: {SAYS}") == 0
    assert failing("RuntimeError: another") > 0
