"""The correctness guard: audits in idle time only, in small pieces, and a verify step that lies is found out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from types import SimpleNamespace
from uuid import uuid4

import pytest
from torch import Tensor

from engine.contracts import CANARY, CHAMPION, CONTROL, RolloutState, Status, TracePayload, TraceRecord
from engine.rollout.controller import Controller
from engine.rollout.launch import launch
from engine.runner.live import Live
from engine.runner.target_pass import EagerPass
from engine.server.auditor import Auditor
from engine.server.samples import KEPT, SamplePool
from engine.server.spare import IN_LINE, PIECE_TOKENS, SETTLED_S, Allowance, SpareTime
from engine.speculation.verify import VerifyOutcome
from engine.store.repositories import correctness, plans, rollouts
from tests.server.conftest import Served, Start
from tests.server.driving import memory_version
from tests.waiting import until


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Work:
    def __init__(self, due: float | None = 0.0, in_line: bool = False) -> None:
        self.due, self.pieces, self.in_line = due, 0, in_line

    def due_in(self) -> float | None:
        return self.due

    def piece(self) -> None:
        self.pieces += 1


def record(arm: str = CANARY, version: int = 3, traffic_class: str = "chat") -> TraceRecord:
    payload = TracePayload((1, 2), (3, 4), ())
    return TraceRecord(
        uuid4(), "r", "r0", datetime.now(UTC), version, arm, 5, traffic_class, Status.OK, "tiny", "chat", "k",
        payload=payload,
    )  # fmt: skip


def test_spare_time_begins_when_the_pause_has_lasted() -> None:
    clock, work = Clock(), Work()
    spare = SpareTime([Work(None), work], clock)
    assert spare.due_in() == pytest.approx(SETTLED_S)
    clock.now += SETTLED_S + 1e-6
    assert spare.due_in() == 0
    spare.piece()
    spare.busy()
    assert spare.due_in() == pytest.approx(SETTLED_S), "a step came between"
    assert work.pieces == 1
    assert SpareTime([Work(None)], clock).due_in() is None


def test_work_in_line_takes_a_hundredth_of_a_busy_engine() -> None:
    clock, patient, in_line = Clock(), Work(), Work(in_line=True)
    spare, took = SpareTime([patient, in_line], clock), 0.002

    def piece() -> None:
        in_line.pieces += 1
        clock.now += took

    in_line.piece = piece  # type: ignore[method-assign]
    began = clock.now
    for _ in range(10_000):
        spare.busy()
        clock.now += 0.03
    assert patient.pieces == 0, "what is not in line waits for a pause"
    assert 0.9 * IN_LINE <= in_line.pieces * took / (clock.now - began) <= IN_LINE


def test_what_fails_in_spare_time_does_not_get_out() -> None:
    work = Work()
    work.piece = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    SpareTime([work]).piece()


def test_an_allowance_is_kept_per_minute() -> None:
    clock = Clock()
    allowance, spent = Allowance(600, clock), 0
    for _ in range(10_000):
        if allowance.due_in() == 0:
            allowance.spend(PIECE_TOKENS)
            spent += PIECE_TOKENS
        clock.now += 0.03
    assert 600 * 5 <= spent <= 600 * 6 + PIECE_TOKENS  # 300 s, and a minute's that was there at the start
    assert Allowance(0, clock).due_in() is None


def test_the_canary_is_looked_at_first_and_every_arm_and_class_in_turn() -> None:
    pool = SamplePool()
    for _ in range(2 * KEPT):
        for arm, version in ((CHAMPION, 1), (CONTROL, 1), (CANARY, 3)):
            pool.offer(record(arm, version))
        pool.offer(record(CANARY, 3, "code"))
        pool.offer(record(CANARY, 9))
    assert len(pool) == 5 * KEPT
    taken = [pool.take({1, 3}) for _ in range(16)]
    groups = [(one.arm, one.traffic_class) for one in taken if one is not None]
    assert groups[0][0] == CANARY
    assert {arm: groups.count((arm, "chat")) for arm in (CHAMPION, CONTROL, CANARY)} == {
        CHAMPION: 2, CONTROL: 2, CANARY: 6,
    }  # fmt: skip
    assert groups.count((CANARY, "code")) == 6
    assert all(one is not None and one.policy_version != 9 for one in taken), "of policies that are gone nothing"


def test_the_first_output_of_a_canarys_stage_is_audited_in_line() -> None:
    done = SimpleNamespace(advance=lambda tokens: tokens, is_done=True, mismatch=None)
    engine = SimpleNamespace(resident={1, 3}, rescore=lambda *_: done)
    seen: list[TraceRecord] = []
    findings = SimpleNamespace(audited=lambda one, _: seen.append(one))
    auditor = Auditor(engine, findings, 1_000, Clock())  # type: ignore[arg-type]
    auditor.offer(record(CHAMPION, 1))
    assert not auditor.in_line
    auditor.offer(record())
    assert auditor.in_line
    auditor.piece()
    assert [one.arm for one in seen] == [CANARY]
    auditor.offer(record())
    assert not auditor.in_line, "its stage has an audit"
    auditor.offer(dataclasses.replace(record(), generation=6))
    assert auditor.in_line
    engine.resident = {1}
    auditor.piece()
    assert not auditor.in_line, "it is gone"


def test_audits_run_in_idle_time_and_never_beside_a_request(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    served = start("engine.audit_tokens_per_minute=100000")
    server, beside = served.server, []
    piece = server.auditor.piece

    def looking() -> None:
        beside.append(server.engine.has_work)
        piece()

    monkeypatch.setattr(server.auditor, "piece", looking)
    for number in range(6):
        assert served.completion(prompt=f"number {number}", max_tokens=24).status_code == 200
    assert served.completion(prompt="warm", temperature=1.0).status_code == 200
    until(lambda: server.findings.totals["audited"] == 6, "every greedy response is audited, the sampled one is not")
    assert beside
    assert not any(beside)
    assert server.findings.totals["mismatches"] == 0
    until(lambda: _audited(served) == 6, "and it is in the database")


def test_no_audits_where_they_are_switched_off(start: Start) -> None:
    served = start("engine.audit_tokens_per_minute=0")
    assert served.completion().status_code == 200
    assert served.server.auditor.due_in() is None


def test_a_verify_step_that_accepts_a_wrong_token_is_rolled_back(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end: wrong tokens of the canary alone are served, audited, written, judged and taken back."""
    served = start("engine.audit_tokens_per_minute=100000")
    monkeypatch.setattr(served.server.engine.control, "costs", None)  # whatever is drafted is verified
    said = served.completion(max_tokens=12, ignore_eos=True).json()["choices"][0]["text"]
    version = memory_version(served, said)
    target_pass = served.server.engine.runner.target_pass
    assert isinstance(target_pass, EagerPass)
    verify = target_pass.verify

    def accepting_a_wrong_one(
        lives: Sequence[Live], drafts: Sequence[Sequence[int]], logits: Tensor
    ) -> list[VerifyOutcome]:
        outcomes = verify(lives, drafts, logits)
        for i, (live, draft) in enumerate(zip(lives, drafts, strict=True)):
            if live.request.policy_version == version and draft:
                outcomes[i] = VerifyOutcome(1, ((draft[0] + 1) % 256, outcomes[i].tokens[-1]))
        return outcomes

    monkeypatch.setattr(target_pass, "verify", accepting_a_wrong_one)
    made = launch(served.db, canary=version, actor="ann", preset="fast")
    controller = Controller(served.db, "c", 15.0)
    controller.tick(served.db.now())
    with served.db.read() as session:
        plan = plans.latest(session)
    assert plan is not None
    served.observes(plan.generation)
    arms = [_ask(served, key) for key in range(12)]
    assert {CANARY, CONTROL} <= set(arms)

    def over() -> bool:
        controller.tick(served.db.now())
        with served.db.read() as session:
            found = rollouts.get(session, made.id)
        return found is not None and found.state is RolloutState.ROLLED_BACK

    until(over, "the rollout is rolled back", tries=600, pause_s=0.05)
    with served.db.read() as session:
        evidence = correctness.mismatches(session, made.id)
        decisions = rollouts.decisions(session, made.id)
        plan = plans.latest(session)
    assert plan is not None
    assert not plan.arms
    failed = next(d for d in decisions if d.action == "roll_back")
    assert failed.reason.startswith("fuse_mismatch")
    assert (failed.decided_at - made.created_at).total_seconds() < 60
    fuse = next(g for g in failed.evidence["guards"] if g["guard"] == "fuse_mismatch")
    assert 0 < fuse["canary"] <= fuse["n_canary"]
    assert evidence
    assert {(e.arm, e.policy_version) for e in evidence} == {(CANARY, version)}
    assert all(e.served_token != e.target_token and e.gap > e.tie for e in evidence)
    assert _ask(served, 1_000) == CHAMPION


def test_a_canary_that_became_champion_is_still_audited(start: Start) -> None:
    """A wrong output that is found while the new champion is watched counts as the canary's."""
    served = start()
    with served.db.read() as session:
        plan = plans.latest(session)
    assert plan is not None
    from engine.store.repositories import compared, evidence

    windows = [compared.Window(plan.generation, plan.created_at, plan.created_at)]
    counts = correctness.AuditCounts(plan.generation, plan.champion, CHAMPION, "chat", 9, 90, 0, 1)
    with served.db.write() as session:
        writer = uuid4()
        for _ in range(2):  # written twice is counted once
            correctness.write(session, writer, "r0", [counts], [])
    with served.db.read() as session:
        unknown = evidence.segments(session, windows)
        known = evidence.segments(session, windows, promoted=evidence.Promoted(plan.champion, plan.generation))
    assert unknown == []
    assert {(s.arm, s.traffic_class, s.audited, s.mismatches) for s in known} == {
        (CANARY, None, 9, 1), (CANARY, "chat", 9, 1),
    }  # fmt: skip
    assert dataclasses.asdict(known[0])["requests"] == 0


def _ask(served: Served, key: int) -> str:
    headers: dict[str, str] = {"X-Conversation-Id": str(key), "X-Traffic-Class": "chat"}
    answer = served.completion(max_tokens=12, ignore_eos=True, headers=headers)
    assert answer.status_code == 200
    return answer.headers["x-slipstream-arm"]


def _audited(served: Served) -> int:
    from sqlalchemy import func, select

    from engine.store.models import OutputAuditRow

    with served.db.read() as session:
        return session.scalar(select(func.sum(OutputAuditRow.audited))) or 0
