"""What the engine found out in spare time, on its way to Postgres: a thread that writes, and tries again.

Counts are written as they stand, under the name of this process, so writing twice changes nothing. Nothing that serves
ever waits for it; what waits here is bounded, and the oldest makes room.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar
from uuid import uuid4

from sqlalchemy.exc import SQLAlchemyError

from engine.contracts import TraceRecord
from engine.runner.rescoring import Rescoring
from engine.runner.shadowing import ShadowReplay
from engine.store.database import Database
from engine.store.repositories import correctness, shadow
from engine.store.repositories.correctness import AuditCounts, Mismatch
from engine.store.repositories.shadow import ShadowRequest

WRITE_S = 1.0
RETRY_S = 2.0
MOST_MISMATCHES = 20
"""Kept as evidence per generation, arm and class; all are counted."""
MOST_COUNTS = 2_000
SLICE = 1_000
"""Rows of one statement: Postgres takes 65,535 values, and after an outage more than that may wait."""
log = logging.getLogger(__name__)
Key = tuple[int, int, str, str]
T = TypeVar("T")


class Findings:
    """``audited`` and ``shadowed`` are called by the engine's thread; one thread of its own writes."""

    def __init__(self, database: Database, replica_id: str) -> None:
        self._database, self._replica_id, self._writer_id = database, replica_id, uuid4()
        self._lock, self._news, self._stop = threading.Lock(), threading.Event(), threading.Event()
        self._counts = dict[Key, AuditCounts]()  # as they stand, the last changed last
        self._unwritten = set[Key]()
        self._mismatches = deque[Mismatch](maxlen=1_000)
        self._shadowed = deque[ShadowRequest](maxlen=10_000)
        self._thread = threading.Thread(target=self._run, name="findings", daemon=True)
        self.totals = {"audited": 0, "ties": 0, "mismatches": 0}
        self.error: str | None = None
        """Why the last write failed; None once one succeeds."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what is there, once, and end."""
        self._stop.set()
        self._news.set()
        self._thread.join()

    def audited(self, record: TraceRecord, seen: Rescoring) -> None:
        key = (record.generation, record.policy_version, record.arm, record.traffic_class)
        found = seen.mismatch
        with self._lock:
            before = self._counts.pop(key, None) or AuditCounts(*key)
            now = replace(
                before,
                audited=before.audited + 1,
                tokens=before.tokens + seen.checked,
                ties=before.ties + seen.ties,
                mismatches=before.mismatches + (found is not None),
            )
            self._counts[key] = now
            self._unwritten.add(key)
            self._forget_old()
            if found is not None and now.mismatches <= MOST_MISMATCHES:
                self._mismatches.append(
                    Mismatch(
                        trace_id=record.trace_id,
                        started_at=record.started_at,
                        replica_id=self._replica_id,
                        policy_version=record.policy_version,
                        arm=record.arm,
                        generation=record.generation,
                        traffic_class=record.traffic_class,
                        position=found.position,
                        served_token=found.served,
                        target_token=found.target,
                        gap=found.gap,
                        tie=seen.tie,
                    )
                )
            self.totals = {
                "audited": self.totals["audited"] + 1,
                "ties": self.totals["ties"] + seen.ties,
                "mismatches": self.totals["mismatches"] + (found is not None),
            }
        self._news.set()

    def shadowed(self, generation: int, record: TraceRecord, arm: str, version: int, seen: ShadowReplay) -> None:
        """What a policy would have earned on a request that another served."""
        counts = seen.counts
        row = ShadowRequest(
            generation=generation,
            trace_id=record.trace_id,
            arm=arm,
            policy_version=version,
            traffic_class=record.traffic_class,
            assignment_key=record.assignment_key,
            steps=counts.steps,
            drafted=counts.drafted,
            accepted=counts.accepted,
            draft_s=seen.draft_s,
            draft_errors=seen.draft_errors,
        )
        with self._lock:
            self._shadowed.append(row)
        self._news.set()

    def stats(self) -> dict[str, int | str | None]:
        """What waits to be written, rows, and why."""
        with self._lock:
            waiting = len(self._unwritten) + len(self._mismatches) + len(self._shadowed)
        return {"waiting": waiting, "error": self.error}

    def flush(self) -> None:
        """Write what is there; SQLAlchemyError where that did not succeed, and then it is still there."""
        with self._lock:
            keys, mismatches = set(self._unwritten), list(self._mismatches)
            counts = [self._counts[key] for key in keys if key in self._counts]
        if counts or mismatches:  # first, and by themselves: nothing that a shadow says may hold up a rollback
            with self._database.write() as session:
                correctness.write(session, self._writer_id, self._replica_id, counts, mismatches)
            with self._lock:
                self._unwritten -= {key for key in keys if self._counts.get(key) in counts}
                _strike(self._mismatches, mismatches)
        with self._lock:
            shadowed = list(self._shadowed)
        for first in range(0, len(shadowed), SLICE):
            part = shadowed[first : first + SLICE]
            with self._database.write() as session:
                shadow.write(session, part)
            with self._lock:
                _strike(self._shadowed, part)

    def _forget_old(self) -> None:
        """Requests of a generation that is so long ago have all been looked at."""
        while len(self._counts) > MOST_COUNTS:
            key = next(iter(self._counts))
            del self._counts[key]
            self._unwritten.discard(key)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._news.wait()
            self._news.clear()
            if self._flushed():
                self._stop.wait(WRITE_S)
            else:
                self._news.set()
                self._stop.wait(RETRY_S)
        if not self._flushed():
            log.error("the last findings are lost: %s", self.error)

    def _flushed(self) -> bool:
        """Whether all was written. A mismatch reaches the controller by this thread: whatever happens, it goes on."""
        try:
            self.flush()
        except SQLAlchemyError as error:
            self.error = str(error).splitlines()[0]
            log.warning("findings wait for the database: %s", self.error)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            log.exception("writing findings failed in a way nobody foresaw, trying again")
        else:
            self.error = None
            return True
        return False


def _strike(waiting: deque[T], written: Sequence[T]) -> None:
    """Take away what was written; the oldest of it may have made room already."""
    for one in written:
        if waiting and waiting[0] is one:
            waiting.popleft()
