"""The learner: after enough new traffic make a candidate, gate it, publish it, and keep a record of the attempt.

It reads traces and writes versions; it never changes what is served. The controller tries what it publishes. What it
knows is in the database: it may be killed at any moment, and the next one goes on from the last transaction.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from engine.contracts import PolicyVersion, SlipstreamError, SpecCounts, artifact_digest
from engine.learner import candidates, gate, traces
from engine.learner.lease import LearnerLease
from engine.learner.looks import Look, due, unspent
from engine.learner.pace import Pace, Stopped
from engine.learner.traces import NoTarget, ServedTarget, TraceBuffer
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import publish
from engine.settings import Settings
from engine.speculation.artifact import load_proposer
from engine.speculation.control import KController
from engine.speculation.proposer import Proposer
from engine.store.database import Database, WriteSession
from engine.store.repositories import intake, learning, leases, plans, policies, rollouts
from engine.store.repositories.intake import TrainableTrace
from engine.store.repositories.learning import ERROR, REFUSED, REGISTERED, Attempt

NICENESS = 19
"""Serving comes first. The lowest priority still is a few per cent of a busy core, so every attempt ends."""
log = logging.getLogger(__name__)
Clock = Callable[[], datetime]


def run(settings: Settings, db: Database, stop: threading.Event, clock: Clock = lambda: datetime.now(UTC)) -> None:
    """Learn until ``stop`` is set, at low priority unless that is not wanted: serving comes first."""
    if settings.yielding:
        os.nice(NICENESS - os.nice(0))
    learner = Learner(settings, db, ArtifactStore(settings.dir("policies")), clock, is_stopping=stop.is_set)
    learner.store.sweep()
    while not stop.is_set():
        try:
            learner.attempt_if_due()
        except Stopped as stopped:
            log.info("%s", stopped)
        except (SlipstreamError, SQLAlchemyError) as error:
            log.error("%s", error)
        except Exception:
            log.exception("learning failed in a way nobody foresaw, trying again")
        stop.wait(settings.learner.poll_s)
    try:
        learner.lease.release()
    except SQLAlchemyError as error:
        log.warning("the lease could not be released and runs out by itself: %s", error)


class ForgottenMeanwhile(SlipstreamError):
    """What an attempt learned from may not teach any more."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What an attempt starts from."""

    target: ServedTarget
    champion: PolicyVersion
    train: tuple[TrainableTrace, ...]
    held_out: tuple[TrainableTrace, ...]
    through: int


@dataclass(slots=True)
class Meter:
    """CPU seconds of this process by part of an attempt."""

    clock: Callable[[], float] = time.process_time
    seconds: dict[str, float] = field(default_factory=lambda: {"learn": 0.0, "gate": 0.0, "export": 0.0})

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = self.clock()
        try:
            yield
        finally:
            self.seconds[name] += self.clock() - began


class Learner:
    """What it keeps in memory only saves work: counted blocks and the tokens of the buffer."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        store: ArtifactStore,
        clock: Clock,
        seed: int = 0,
        pause: Callable[[float], None] = time.sleep,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.settings, self.db, self.store, self.clock = settings, db, store, clock
        self.rng = np.random.default_rng(seed)
        self.lease = LearnerLease(db, clock)
        self._pace = Pace(settings.learner.duty_cycle, pause, is_stopping=is_stopping)
        self._buffer = TraceBuffer(settings.learner.window_requests)
        self._maker = candidates.maker(settings, db, store)

    def attempt_if_due(self) -> Attempt | None:
        """Take in what is new; then one attempt when there is enough and nothing is being tried. None otherwise."""
        now, began = self.clock(), time.process_time()
        if not self.lease.take():  # another learner is at work
            return None
        traces.take_in(self.db, self.settings.learner.gate_share)
        try:
            situation = self._situation(now)
        except NoTarget:  # the engine is starting, or stopped: there is nothing to learn for
            return None
        return self._attempt(situation, now, began) if situation is not None else None

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
            if last is not None and now < _rested(last, wanted.duty_cycle):
                return None
            enough = wanted.min_requests if last is None else wanted.every_requests
            if intake.count(session, target.model, last.through if last else 0) < enough:
                return None
            passed, looks = learning.looks(session)
            since, last_look = unspent(passed, [Look(*look) for look in looks])
            judges = traces.held_out(session, target.model, since)
            if not due(judges, last_look):  # they come with the traffic
                return None
            champion = policies.get(session, plan.champion)
            train = self._buffer.refresh(session, target.model)
            held_out = tuple(intake.load(session, judges))
            through = intake.last_ordinal(session, target.model)
        assert champion is not None  # the ledger's foreign key
        return Situation(target, champion, train, held_out, through)

    def _attempt(self, situation: Situation, now: datetime, began: float) -> Attempt:
        meter = Meter()
        self._pace.begin()
        attempt = Attempt(
            started_at=now,
            finished_at=now,
            outcome=ERROR,
            reason="",
            train_traces=len(situation.train),
            gate_traces=len(situation.held_out),
            gate={},
            cpu_s=0.0,
            parent_version=situation.champion.version,
            through=situation.through,
        )

        def record(session: WriteSession, attempt: Attempt) -> Attempt:
            self.lease.check(session)
            done = replace(
                attempt,
                finished_at=self.clock(),
                cpu_s=time.process_time() - began,
                learn_cpu_s=meter.seconds["learn"],
                gate_cpu_s=meter.seconds["gate"],
                export_cpu_s=meter.seconds["export"],
            )
            return replace(done, id=learning.record(session, done))

        try:
            attempt = self._learn(situation, attempt, meter, record)
        except (leases.LeaseLost, Stopped):
            raise
        except Exception as error:
            # Whatever went wrong is an outcome: it is kept, and the next traffic gets its chance.
            log.exception("the attempt failed")
            attempt = replace(attempt, reason=f"{type(error).__name__}: {error}")
        if attempt.id is None:
            with self.db.write() as session:
                attempt = record(session, attempt)
        log.info("attempt %s: %s: %s", attempt.id, attempt.outcome, attempt.reason)
        return attempt

    def _learn(
        self, situation: Situation, attempt: Attempt, meter: Meter, record: Callable[[WriteSession, Attempt], Attempt]
    ) -> Attempt:
        target, champion, wanted = situation.target, situation.champion, self.settings.learner
        with meter.part("learn"):
            files = self._maker.make(situation.train, target, champion, self._between)
        self.lease.keep()
        with self.db.read() as session:
            known = policies.by_digest(session, artifact_digest(files))
        if known is not None:
            return replace(attempt, outcome=REFUSED, reason=f"no news: the same policy is v{known.version} already")
        with meter.part("gate"):
            resident = load_proposer(self.store.files(champion.digest), champion.digest, target.fingerprint)
            report = gate.examine(
                files,
                resident,
                situation.held_out,
                target,
                wanted.worst_class_drop,
                self.rng,
                replayer=self._replayed,
            )
        attempt = replace(attempt, reason="; ".join(report.reasons), gate=report.to_json())
        if not report.passed:
            return replace(attempt, outcome=REFUSED)
        done = attempt

        def with_attempt(session: WriteSession, made: PolicyVersion) -> None:
            nonlocal done
            _check_still_allowed(session, situation.train, made)
            done = record(session, replace(attempt, outcome=REGISTERED, version=made.version))

        try:
            with meter.part("export"):
                publish(
                    self.db,
                    self.store,
                    files,
                    parent=champion.version,
                    gate=attempt.gate,
                    lineage=[
                        traces.lineage(policies.TRAIN, situation.train),
                        traces.lineage(policies.GATE, situation.held_out),
                    ],
                    note=attempt.reason,
                    also=with_attempt,
                )
        except ForgottenMeanwhile as error:
            self._discard(artifact_digest(files))
            return replace(attempt, outcome=REFUSED, reason=str(error))
        return done

    def _between(self) -> None:
        """Between the pieces of an attempt."""
        self.lease.keep()
        self._pace.rest(self.lease.keep)

    def _replayed(
        self, proposer: Proposer, trace: TrainableTrace, controller: KController | None
    ) -> tuple[SpecCounts, float]:
        """The gate's replay, by the maker's own means where it has any."""
        self._between()
        return (self._maker.replayer or gate.stored)(proposer, trace, controller)

    def _discard(self, digest: str) -> None:
        """The files of a candidate that became no version: they hold what was forgotten."""
        with self.db.read() as session:
            known = policies.by_digest(session, digest)
        if known is None:
            self.store.discard(digest)


def _check_still_allowed(session: WriteSession, train: Sequence[TrainableTrace], made: PolicyVersion) -> None:
    """After the lineage is written: ForgottenMeanwhile where a trace, or the draft that was tuned, was withdrawn.

    ``forget`` marks first and then waits for whoever writes lineage: one of the two sees the other.
    """
    if gone := intake.withdrawn(session, [trace.ordinal for trace in train]):
        raise ForgottenMeanwhile(f"its traces were forgotten meanwhile: {gone} may not teach any more")
    digest = (made.manifest.get("lineage") or {}).get("draft")
    draft = policies.by_digest(session, digest) if digest is not None else None
    if draft is not None and draft.retired_at is not None:
        raise ForgottenMeanwhile(f"the draft it was tuned from, v{draft.version}, was retired meanwhile")


def _rested(last: Attempt, duty_cycle: float) -> datetime:
    """When the next attempt may begin, so that attempts take no more than this share of a processor."""
    return max(last.finished_at, last.started_at + timedelta(seconds=last.cpu_s / duty_cycle))


def build_candidate(settings: Settings, db: Database, now: datetime | None = None) -> dict[str, bytes]:
    """What would be proposed from the traces of this moment, without a gate."""
    traces.take_in(db, settings.learner.gate_share)
    with db.read() as session:
        target = traces.served_target(session, now or datetime.now(UTC))
        train = TraceBuffer(settings.learner.window_requests).refresh(session, target.model)
        plan = plans.latest(session)
        parent = policies.get(session, plan.champion) if plan is not None else None
    return candidates.MemoryMaker(settings).make(train, target, parent)
