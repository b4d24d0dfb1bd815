"""The learner against a real Postgres: when it tries, what it keeps, and what it leaves alone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from sqlalchemy.exc import OperationalError

from engine.contracts import PolicyVersion, ProposerKind, ReplicaState, RolloutState
from engine.learner import candidates, memory
from engine.learner import learner as module
from engine.learner.learner import Learner, build_candidate
from engine.learner.lease import LEASE, LEASE_S, LearnerLease
from engine.learner.looks import ALPHA, LEVEL, MAX_LOOKS, Look, unspent
from engine.learner.pace import Stopped
from engine.learner.traces import ServedTarget
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import ensure_version, publish
from engine.rollout.launch import launch
from engine.settings import LearnerSettings, Settings
from engine.speculation.artifact import build_artifact
from engine.store.database import Database
from engine.store.repositories import intake, learning, leases, plans, policies, replicas, rollouts
from engine.store.repositories.intake import TrainableTrace
from engine.store.repositories.learning import Attempt
from tests.learner.test_gate import COSTS, traffic
from tests.rollout import database_world as world

NOW = datetime.now(UTC) - timedelta(hours=2)


class World:
    """An installation whose champion is the n-gram policy, with a clock and traffic of phrases."""

    def __init__(self, db: Database, home: Path) -> None:
        wanted = LearnerSettings(every_requests=40, min_requests=60, duty_cycle=1.0)
        self.settings = Settings(home=home, learner=wanted)
        self.db, self.store, self.now = db, ArtifactStore(self.settings.dir("policies")), NOW
        self.rng = np.random.default_rng(0)
        self.none = ensure_version(db, self.store, build_artifact(ProposerKind.NONE, 0)).version
        self.champion = ensure_version(db, self.store, build_artifact(ProposerKind.NGRAM, 4)).version
        with db.write() as session:
            plans.append(session, champion=self.champion, fallback=self.none, actor="t", reason="t")
        self.learner = Learner(self.settings, db, self.store, lambda: self.now)

    def beat(self) -> None:
        stats = {"target_fingerprint": "f" * 64, "tokenizer_fingerprint": "t" * 64}
        stats["step_cost_ms"] = {str(rows): ms for rows, ms in COSTS.items()}  # type: ignore[assignment]
        state = ReplicaState("r0", "http://r0", world.MODEL, NOW, self.now, 1, (self.none, self.champion), stats)
        with self.db.write() as session:
            replicas.beat(session, state)

    def serve(self, requests: int, **columns: object) -> None:
        self.now += timedelta(seconds=10)
        texts = [(t.traffic_class, t.prompt_ids, t.output_ids) for t in traffic(self.rng, requests)]
        world.remember(self.db, self.now, texts, self.rng, **columns)
        self.now += timedelta(seconds=10)
        self.beat()


@pytest.fixture
def w(db: Database, tmp_path: Path) -> World:
    return World(db, tmp_path)


def test_enough_traffic_makes_a_version_with_its_lineage(w: World) -> None:
    w.serve(59)
    assert w.learner.attempt_if_due() is None
    w.serve(41)
    attempt = w.learner.attempt_if_due()
    assert attempt is not None
    assert attempt.outcome == learning.REGISTERED, attempt.reason
    with w.db.read() as session:
        made = policies.get(session, attempt.version or 0)
        roles = {part.role: part for part in policies.lineage(session, attempt.version or 0)}
        kept = learning.attempts(session)
    assert made is not None
    assert (made.kind, made.parent_version) == (ProposerKind.TRACE_MEMORY, w.champion)
    assert roles["train"].traces + roles["gate"].traces == 100
    assert not roles["train"].members.meets(roles["gate"].members)
    assert w.store.is_sound(made.digest)
    assert kept[0].gate["overall"]["low"] > 0
    assert kept[0].cpu_s > 0


def test_it_waits_while_its_version_is_tried_and_for_the_next_traffic(w: World) -> None:
    w.serve(100)
    attempt = w.learner.attempt_if_due()
    assert attempt is not None
    w.serve(100)
    assert w.learner.attempt_if_due() is None  # the version has not been tried yet
    made = launch(w.db, canary=attempt.version or 0, actor="t", preset="fast", now=w.now)
    assert w.learner.attempt_if_due() is None  # it is being tried
    with w.db.write() as session:
        rollouts.apply(
            session, made.id, expected=made.state, state=RolloutState.CANCELLED, status=made.status, decision=None,
            now=w.now,
        )  # fmt: skip
    assert w.learner.attempt_if_due() is not None
    assert w.learner.attempt_if_due() is None


def test_a_refusal_is_kept_with_its_reason(w: World) -> None:
    w.serve(100)
    files = build_candidate(w.settings, w.db, w.now)
    made = publish(w.db, w.store, files)
    attempt = w.learner.attempt_if_due()
    assert attempt is not None
    assert (attempt.outcome, attempt.version) == (learning.REFUSED, None)
    assert attempt.reason == f"no news: the same policy is v{made.version} already"


def test_traffic_that_teaches_nothing_is_refused_by_the_gate(w: World) -> None:
    texts = [("chat", [1, 2, n], w.rng.integers(0, 10**6, 40).tolist()) for n in range(100)]
    world.remember(w.db, w.now, texts, w.rng)
    w.now += timedelta(seconds=5)
    w.beat()
    attempt = w.learner.attempt_if_due()
    assert attempt is not None
    assert attempt.outcome == learning.REFUSED
    assert attempt.gate["passed"] is False


def test_an_error_is_an_outcome_and_not_the_end(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise MemoryError("no room")

    w.serve(100)
    with monkeypatch.context() as patch:
        patch.setattr(module.candidates, "build_memory", broken)
        attempt = w.learner.attempt_if_due()
    assert attempt is not None
    assert (attempt.outcome, attempt.reason) == (learning.ERROR, "MemoryError: no room")
    w.serve(40)
    again = w.learner.attempt_if_due()
    assert again is not None
    assert again.outcome == learning.REGISTERED


def test_without_an_engine_there_is_nothing_to_learn_for(w: World) -> None:
    w.serve(100)
    w.now += timedelta(minutes=5)
    assert w.learner.attempt_if_due() is None


def test_traces_of_another_model_do_not_teach(w: World) -> None:
    w.serve(100, model="another")
    assert w.learner.attempt_if_due() is None
    with w.db.read() as session:
        assert intake.count(session, "another") == 100
        assert intake.count(session, world.MODEL) == 0


def test_the_first_attempt_waits_for_min_requests_only(w: World) -> None:
    few = LearnerSettings(every_requests=500, min_requests=60, duty_cycle=1.0)
    w.learner = Learner(w.settings.model_copy(update={"learner": few}), w.db, w.store, lambda: w.now)
    w.serve(59)
    assert w.learner.attempt_if_due() is None
    w.serve(1)
    assert w.learner.attempt_if_due() is not None


def test_attempts_take_no_more_than_their_share_of_the_time(w: World) -> None:
    """Processor time counts: who waits for a processor has not had it."""
    began = datetime(2026, 1, 1, tzinfo=UTC)
    last = Attempt(began, began + timedelta(seconds=60), "refused", "", 0, 0, {}, 20.0)
    assert module._rested(last, 0.25) == began + timedelta(seconds=80)
    assert module._rested(last, 0.5) == module._rested(last, 1.0) == last.finished_at


def test_an_attempt_rests_all_along(w: World) -> None:
    """The planted fault: rests only between attempts, and whoever is served meanwhile shares a processor."""
    rests = list[float]()
    wanted = w.settings.learner.model_copy(update={"duty_cycle": 0.1})
    settings = w.settings.model_copy(update={"learner": wanted})
    w.learner = Learner(settings, w.db, w.store, lambda: w.now, pause=rests.append)
    w.serve(100)
    attempt = w.learner.attempt_if_due()
    assert attempt is not None
    assert sum(rests) > 0.5 * 9 * (attempt.learn_cpu_s + attempt.gate_cpu_s)
    assert len(rests) > 5


def test_an_attempt_that_shall_end_leaves_nothing_behind(w: World) -> None:
    w.learner = Learner(w.settings, w.db, w.store, lambda: w.now, is_stopping=lambda: True)
    w.serve(100)
    with pytest.raises(Stopped):
        w.learner.attempt_if_due()
    with w.db.read() as session:
        assert learning.attempts(session) == []


def test_only_one_learner_works_at_a_time(w: World) -> None:
    other = Learner(w.settings, w.db, w.store, lambda: w.now)
    w.serve(100)
    assert w.learner.attempt_if_due() is not None
    w.serve(100)
    assert other.attempt_if_due() is None
    w.now += timedelta(seconds=LEASE_S + 1)
    w.beat()
    w.serve(0)
    with w.db.read() as session:
        assert intake.count(session, world.MODEL) == 100
    other.attempt_if_due()
    with w.db.read() as session:
        assert intake.count(session, world.MODEL) == 200


def test_a_learner_that_lost_its_lease_publishes_nothing(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    build = memory.build_memory

    def slow(*args: object) -> dict[str, bytes]:
        with w.db.write() as session:
            leases.acquire(session, LEASE, "another", w.now + timedelta(hours=1), 60)
        return build(*args)  # type: ignore[arg-type]

    w.serve(100)
    monkeypatch.setattr(module.candidates, "build_memory", slow)
    with pytest.raises(leases.LeaseLost):
        w.learner.attempt_if_due()
    with w.db.read() as session:
        assert learning.attempts(session) == []
        assert len(policies.all_versions(session)) == 2


class LongAttempt(candidates.MemoryMaker):
    """Takes five leases' time to make its candidate, in parts; the other learner asks for its turn in between."""

    def __init__(self, w: World, other: Learner, alive: bool = True) -> None:
        super().__init__(w.settings)
        self.w, self.other, self.alive = w, other, alive
        self.others_turn = list[bool]()

    def make(
        self,
        train: Sequence[TrainableTrace],
        target: ServedTarget,
        champion: PolicyVersion | None,
        alive: Callable[[], None] = lambda: None,
    ) -> dict[str, bytes]:
        for _ in range(10):
            self.w.now += timedelta(seconds=LEASE_S / 2)
            if self.alive:
                alive()
            self.others_turn.append(self.other.lease.take())
        return super().make(train, target, champion)


def test_a_long_attempt_keeps_its_lease(w: World) -> None:
    other = Learner(w.settings, w.db, w.store, lambda: w.now)
    w.serve(100)
    maker = w.learner._maker = LongAttempt(w, other)
    attempt = w.learner.attempt_if_due()
    assert attempt is not None
    assert attempt.outcome == learning.REGISTERED, attempt.reason
    assert not any(maker.others_turn)


def test_a_long_attempt_that_does_not_keep_its_lease_loses_it(w: World) -> None:
    """The planted fault: as it was, two learners with long attempts took the lease from each other for ever."""
    w.serve(100)
    w.learner._maker = LongAttempt(w, Learner(w.settings, w.db, w.store, lambda: w.now), alive=False)
    with pytest.raises(leases.LeaseLost, match="taken the lease"):
        w.learner.attempt_if_due()
    with w.db.read() as session:
        assert learning.attempts(session) == []


def test_an_attempt_ends_where_its_lease_was_lost_and_outlives_a_silent_database(
    w: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = LearnerLease(w.db, lambda: w.now)
    assert lease.take()
    w.now += timedelta(seconds=LEASE_S / 2)
    with monkeypatch.context() as patch:
        patch.setattr(leases, "acquire", Mock(side_effect=OperationalError("", {}, Exception("no answer"))))
        lease.keep()  # whoever writes is checked
    w.now += timedelta(seconds=LEASE_S)
    other = LearnerLease(w.db, lambda: w.now)
    assert other.take()
    other.release()  # free again, but the token has grown
    with pytest.raises(leases.LeaseLost):
        lease.keep()


def test_refusals_without_a_comparison_are_no_looks(w: World) -> None:
    """A look spends error level; after six at the same held-out requests the next ones are judged on later requests."""
    began, compared = w.now, {"overall": {"n": 9}}
    tries = [("refused", {}), ("refused", {"overall": None}), ("error", {}), ("refused", compared)]
    with w.db.write() as session:
        assert learning.looks(session) == (0, [])
        for at, (outcome, verdict) in enumerate(tries):
            learning.record(session, Attempt(began, began, outcome, "", 9, 30 + at, verdict, 1.0, through=100 + at))
        assert learning.looks(session) == (0, [(103, 33)])
        learning.record(session, Attempt(began, began, "registered", "", 9, 9, compared, 1.0, through=200))
        assert learning.looks(session) == (200, [])


def test_refused_candidates_use_up_the_error_level_and_a_pass_brings_fresh_requests() -> None:
    looks = [Look(200 + n, 10 * n) for n in range(1, 15)]
    assert unspent(200, []) == (200, None)
    assert unspent(200, looks[:5]) == (200, looks[4])
    assert unspent(200, looks[:6]) == (206, None)
    assert unspent(200, looks[:14]) == (212, looks[13])
    assert pytest.approx(ALPHA) == MAX_LOOKS * LEVEL


def test_the_loop_survives_what_fails_and_stops_when_told(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, calls = threading.Event(), []

    def fails(self: Learner) -> None:
        calls.append(1)
        if len(calls) == 3:
            stop.set()
        raise module.SlipstreamError("not now")

    monkeypatch.setattr(Learner, "attempt_if_due", fails)
    monkeypatch.setattr(module.os, "nice", lambda n: n)
    quick = w.settings.model_copy(update={"learner": w.settings.learner.model_copy(update={"poll_s": 0.001})})
    module.run(quick, w.db, stop)
    assert len(calls) == 3


def test_a_learner_that_stops_gives_its_lease_up(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, attempt = threading.Event(), Learner.attempt_if_due
    monkeypatch.setattr(Learner, "attempt_if_due", lambda self: (stop.set(), attempt(self))[1])
    monkeypatch.setattr(module.os, "nice", lambda n: n)
    left = w.store.root / f".new-{2**22 + 1}-0-{socket.gethostname()}"  # no process has this id
    left.mkdir(parents=True)
    module.run(w.settings, w.db, stop, lambda: w.now)
    assert LearnerLease(w.db, lambda: w.now).take()
    assert not left.exists()
