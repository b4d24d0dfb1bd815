"""The learner against a real Postgres: when it tries, what it keeps, and what it leaves alone."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from engine.contracts import ProposerKind, ReplicaState, RolloutState
from engine.learner import learner as module
from engine.learner import traces
from engine.learner.learner import Learner
from engine.learner.memory import build_candidate
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import ensure_version, publish
from engine.rollout.launch import launch
from engine.settings import LearnerSettings, Settings
from engine.speculation.artifact import build_artifact
from engine.store.database import Database
from engine.store.repositories import learning, plans, policies, replicas, rollouts
from tests.learner.test_gate import COSTS, traffic
from tests.rollout import database_world as world

NOW = datetime.now(UTC)


class World:
    """An installation whose champion is the n-gram policy, with a clock and traffic of phrases."""

    def __init__(self, db: Database, home: Path) -> None:
        wanted = LearnerSettings(every_requests=40, min_requests=60)
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

    def serve(self, requests: int) -> None:
        self.now += timedelta(seconds=10)
        texts = [(t.traffic_class, t.prompt_ids, t.output_ids) for t in traffic(self.rng, requests)]
        world.remember(self.db, self.now, texts, self.rng)
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
    assert len(roles["train"].trace_ids) + len(roles["gate"].trace_ids) == 100
    assert not set(roles["train"].trace_ids) & set(roles["gate"].trace_ids)
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
    texts = [("chat", [1, 2, 3], w.rng.integers(0, 10**6, 40).tolist()) for _ in range(100)]
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
        patch.setattr(module.memory, "build_memory", broken)
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
    w.serve(100)
    with w.db.read() as session:
        assert learning.new_trainable(session, world.MODEL, None) == 100
        assert learning.new_trainable(session, "another", None) == 0
        assert traces.load(session, "another", 100, 0.25).train == ()


def test_the_window_holds_the_newest_and_the_split_never_changes(w: World) -> None:
    w.serve(100)
    with w.db.read() as session:
        whole = traces.load(session, world.MODEL, 100, 0.25)
        newest = traces.load(session, world.MODEL, 30, 0.25)
    assert 10 < len(whole.held_out) < 45
    assert len(newest.train) + len(newest.held_out) == 30
    assert {t.trace_id for t in newest.held_out} <= {t.trace_id for t in whole.held_out}
    assert (
        min(t.started_at for t in newest.train + newest.held_out)
        >= sorted(t.started_at for t in whole.train + whole.held_out)[70]
    )


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
