"""The learner: after enough new traffic make a candidate, gate it, publish it, and keep a record of the attempt.

It reads traces and writes versions; it never changes what is served. The controller tries what it publishes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from engine.contracts import PolicyVersion, SlipstreamError, artifact_digest
from engine.learner import gate, memory, traces
from engine.learner.gate import GateReport
from engine.learner.traces import NoTarget, ServedTarget, Split
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import publish
from engine.settings import Settings
from engine.speculation.artifact import load_proposer
from engine.store.database import Database
from engine.store.repositories import learning, plans, policies, rollouts
from engine.store.repositories.learning import ERROR, REFUSED, REGISTERED, Attempt

NICENESS = 10
log = logging.getLogger(__name__)
Clock = Callable[[], datetime]


def run(settings: Settings, db: Database, stop: threading.Event, clock: Clock = lambda: datetime.now(UTC)) -> None:
    """Learn until ``stop`` is set, at low priority: serving comes first."""
    os.nice(NICENESS)
    learner = Learner(settings, db, ArtifactStore(settings.dir("policies")), clock)
    while not stop.is_set():
        try:
            learner.attempt_if_due()
        except (SlipstreamError, SQLAlchemyError) as error:
            log.error("%s", error)
        except Exception:
            log.exception("learning failed in a way nobody foresaw, trying again")
        stop.wait(settings.learner.poll_s)


@dataclass(frozen=True, slots=True)
class Situation:
    """What an attempt starts from."""

    target: ServedTarget
    champion: PolicyVersion
    split: Split


class Learner:
    """Keeps no state of its own: when to learn next is read from the record of attempts."""

    def __init__(self, settings: Settings, db: Database, store: ArtifactStore, clock: Clock, seed: int = 0) -> None:
        self.settings, self.db, self.store, self.clock = settings, db, store, clock
        self.rng = np.random.default_rng(seed)

    def attempt_if_due(self) -> Attempt | None:
        """One attempt when there is enough new traffic and nothing is being tried; None otherwise."""
        now = self.clock()
        try:
            situation = self._situation(now)
        except NoTarget:  # the engine is starting, or stopped: there is nothing to learn for
            return None
        return self._attempt(situation, now) if situation is not None else None

    def _situation(self, now: datetime) -> Situation | None:
        wanted = self.settings.learner
        with self.db.read() as session:
            plan = plans.latest(session)
            if plan is None or rollouts.active(session) is not None:
                return None
            if wanted.auto_rollout and learning.awaiting_rollout(session, plan.champion) is not None:
                return None
            target = traces.served_target(session, now)
            last = next(iter(learning.attempts(session, limit=1)), None)
            enough = wanted.every_requests if last is not None else max(wanted.every_requests, wanted.min_requests)
            if learning.new_trainable(session, target.model, last.started_at if last else None) < enough:
                return None
            champion = policies.get(session, plan.champion)
            split = traces.load(session, target.model, wanted.window_requests, wanted.gate_share)
        assert champion is not None  # the ledger's foreign key
        return Situation(target, champion, split)

    def _attempt(self, situation: Situation, now: datetime) -> Attempt:
        began = time.process_time()
        attempt = Attempt(
            started_at=now,
            finished_at=now,
            outcome=ERROR,
            reason="",
            train_traces=len(situation.split.train),
            gate_traces=len(situation.split.held_out),
            gate={},
            cpu_s=0.0,
            parent_version=situation.champion.version,
        )
        try:
            attempt = self._learn(situation, attempt)
        except Exception as error:
            # Whatever went wrong is an outcome: it is kept, and the next traffic gets its chance.
            log.exception("the attempt failed")
            attempt = replace(attempt, reason=f"{type(error).__name__}: {error}")
        attempt = replace(attempt, finished_at=self.clock(), cpu_s=time.process_time() - began)
        with self.db.write() as session:
            attempt = replace(attempt, id=learning.record(session, attempt))
        log.info("attempt %s: %s: %s", attempt.id, attempt.outcome, attempt.reason)
        return attempt

    def _learn(self, situation: Situation, attempt: Attempt) -> Attempt:
        target, champion, split = situation.target, situation.champion, situation.split
        files = memory.build_memory(split.train, target, self.settings.learner, champion.digest)
        with self.db.read() as session:
            known = policies.by_digest(session, artifact_digest(files))
        if known is not None:
            return replace(attempt, outcome=REFUSED, reason=f"no news: the same policy is v{known.version} already")
        resident = load_proposer(self.store.files(champion.digest), champion.digest, target.fingerprint)
        report = gate.examine(files, resident, split.held_out, target, self.settings.learner.worst_class_drop, self.rng)
        reason = "; ".join(report.reasons)
        if not report.passed:
            return replace(attempt, outcome=REFUSED, reason=reason, gate=report.to_json())
        made = self._publish(situation, files, report, reason)
        return replace(attempt, outcome=REGISTERED, reason=reason, gate=report.to_json(), version=made.version)

    def _publish(self, situation: Situation, files: dict[str, bytes], report: GateReport, note: str) -> PolicyVersion:
        split = situation.split
        return publish(
            self.db,
            self.store,
            files,
            parent=situation.champion.version,
            gate=report.to_json(),
            lineage=[traces.lineage("train", split.train), traces.lineage("gate", split.held_out)],
            note=note,
        )
