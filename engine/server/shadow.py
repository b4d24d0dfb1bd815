"""Shadow mode: before it serves anybody, a canary drafts on copies of the requests that others served.

Champion and canary are replayed over the same responses, both as if every draft had been verified whole. What that
takes from a busy engine is a hundredth of its time at most, so it comes to an end under full load too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from engine.contracts import CANARY, CONTROL, SHADOW, ServingPlan, Status, TraceRecord
from engine.runner.engine import Engine
from engine.runner.shadowing import ShadowReplay
from engine.server.findings import Findings
from engine.server.samples import SamplePool
from engine.server.spare import PIECE_TOKENS

MOST_REQUESTS = 5_000
"""Replayed per generation; what is certain by then stays so."""


@dataclass(slots=True)
class _AtWork:
    """One request; ``left`` are the arms still to be replayed."""

    plan: ServingPlan
    record: TraceRecord
    left: list[tuple[str, int]]
    replay: ShadowReplay | None = None


class Shadow:
    """``offer`` may be called from any thread, the rest is the engine's thread's. ``plan``: what is served now."""

    in_line = True

    def __init__(
        self, engine: Engine, findings: Findings, plan: Callable[[], ServingPlan | None], clock: Callable[[], float]
    ) -> None:
        self._engine, self._findings, self._plan, self._clock = engine, findings, plan, clock
        self._lock, self._pools = threading.Lock(), (0, SamplePool())  # generation, its requests
        self._at_work: _AtWork | None = None
        self._seen = (0, 0)  # generation, requests replayed under it

    def offer(self, record: TraceRecord, slice_name: str | None) -> None:
        """A request has ended: a copy of it for the shadow, where there is one and the request is eligible."""
        plan = self._shadowing()
        if plan is None or record.payload is None or record.status is not Status.OK or record.output_tokens < 2:
            return
        if plan.takes(record.traffic_class, record.tenant, slice_name):
            self._pool(plan).offer(record)

    def due_in(self) -> float | None:
        plan = self._shadowing()
        if plan is None:
            return None if self._at_work is None else 0.0
        if self._seen[0] == plan.generation and self._seen[1] >= MOST_REQUESTS:
            return None
        return 0.0 if self._at_work is not None or len(self._pool(plan)) else None

    def piece(self) -> None:
        plan, work = self._shadowing(), self._at_work
        self._at_work = None  # what fails is not tried again
        if work is not None and (plan is None or plan.generation != work.plan.generation):
            _end(work)
            work = None
        if plan is None:
            return
        if work is None and (work := self._begin(plan)) is None:
            return
        try:
            self._advance(work)
        except Exception:
            _end(work)
            raise
        if work.left:
            self._at_work = work
        else:
            generation, seen = self._seen
            self._seen = (plan.generation, seen + 1 if generation == plan.generation else 1)

    def _begin(self, plan: ServingPlan) -> _AtWork | None:
        record = self._pool(plan).take(self._engine.resident)
        shadow = plan.arm(SHADOW)
        if record is None or shadow is None:
            return None
        return _AtWork(plan, record, [(CANARY, shadow.policy_version), (CONTROL, plan.champion)])

    def _advance(self, work: _AtWork) -> None:
        arm, version = work.left[0]
        if work.replay is None:
            work.replay = self._engine.shadow(version, work.record)
        work.replay.advance(PIECE_TOKENS)
        if work.replay.is_done:
            self._findings.shadowed(work.plan.generation, work.record, arm, version, work.replay)
            _end(work)
            del work.left[0]

    def _pool(self, plan: ServingPlan) -> SamplePool:
        """The requests served under this plan: those before it may have taught its canary, or not be its to see."""
        with self._lock:
            if self._pools[0] != plan.generation:
                self._pools = (plan.generation, SamplePool())
            return self._pools[1]

    def _shadowing(self) -> ServingPlan | None:
        plan = self._plan()
        return plan if plan is not None and plan.arm(SHADOW) is not None else None


def _end(work: _AtWork) -> None:
    replay, work.replay = work.replay, None
    if replay is not None:
        replay.end()
