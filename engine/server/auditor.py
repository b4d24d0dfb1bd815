"""The correctness guard's eyes: responses that were served, compared with what the target says without any draft.

A draft never changes an output; should one ever do, it is seen here, and the guard ``fuse_mismatch`` takes the canary
back at the first. Everything that the evidence needs is kept here and written by ``findings``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from engine.contracts import CANARY, Status, TraceRecord
from engine.runner.engine import Engine
from engine.runner.rescoring import Rescoring
from engine.server.findings import Findings
from engine.server.samples import SamplePool
from engine.server.spare import PIECE_TOKENS, Allowance

Stage = tuple[int, int]
"""(policy version, ledger generation)."""
log = logging.getLogger(__name__)


class Auditor:
    """``offer`` may be called from any thread, the rest is the engine's thread's. 0 tokens a minute switch it off.

    It works in spare time, but for the first output of a canary's stage: an engine that never pauses must not hide it.
    """

    def __init__(self, engine: Engine, findings: Findings, tokens_per_minute: int, clock: Callable[[], float]) -> None:
        self._engine, self._findings = engine, findings
        self._allowance = Allowance(tokens_per_minute, clock)
        self._pool = SamplePool()
        self._at_work: tuple[TraceRecord, Rescoring] | None = None
        self._unseen: Stage | None = None  # of a canary that waits for its first audit
        self._seen: Stage | None = None

    @property
    def in_line(self) -> bool:
        return self._unseen is not None

    def offer(self, record: TraceRecord) -> None:
        """A request has ended. One that was sampled has no single right answer, and one without tokens none to see."""
        if record.status is Status.OK and record.temperature == 0 and record.payload is not None:
            self._pool.offer(record)
            if record.arm == CANARY and (stage := (record.policy_version, record.generation)) != self._seen:
                self._unseen = stage

    def due_in(self) -> float | None:
        return self._allowance.due_in() if self._at_work is not None or len(self._pool) else None

    def piece(self) -> None:
        if self._at_work is None:
            record = self._pool.take(self._engine.resident)
            if record is None or record.arm != CANARY:
                self._unseen = None  # it is the turn of others, in spare time: the canary's wait no more
            if record is None or record.payload is None:
                return
            self._at_work = (record, self._engine.rescore(record.payload.prompt_ids, record.payload.output_ids))
        record, rescoring = self._at_work
        self._at_work = None  # what fails is not tried again
        self._allowance.spend(rescoring.advance(PIECE_TOKENS))
        if not rescoring.is_done:
            self._at_work = (record, rescoring)
            return
        self._findings.audited(record, rescoring)
        if record.arm == CANARY:
            self._seen, self._unseen = (record.policy_version, record.generation), None
        if (found := rescoring.mismatch) is not None:
            log.error(
                "trace %s of policy v%d: output token %d is %d, the target's own is %d, by %.3g in its logits",
                record.trace_id, record.policy_version, found.position, found.served, found.target, found.gap,
            )  # fmt: skip
