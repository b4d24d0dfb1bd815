"""Which traces teach and which judge: split by the request, for ever, and kept in a bounded buffer.

The split is by hash of the prompt's tokens, so a prompt that comes again, from whomever, lies on the side where it lay
the first time, and what judges a candidate has never taught anybody. Only the buffer's traces teach: half of it is the
newest traffic, the other half a uniform sample per class of what was before, so that a class which comes back is known.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np

from engine.contracts import SlipstreamError
from engine.store.database import Database, ReadSession
from engine.store.members import Members
from engine.store.repositories import intake, replicas
from engine.store.repositories.intake import TrainableTrace
from engine.store.repositories.policies import Lineage

RECENT = timedelta(seconds=60)
"""A replica that has not spoken for longer no longer says which target is served."""
MAX_HELD_OUT = 256
"""The gate replays at most this many held-out requests, the newest: it must not cost what it saves."""
TAKEN_AT_ONCE = 500


class NoTarget(SlipstreamError):
    """No live replica says which target model it serves, so nothing can be learned for it."""


@dataclass(frozen=True, slots=True)
class ServedTarget:
    """The model whose drafts are learned. ``step_cost_ms``: rows in one target pass → milliseconds, {} if unknown."""

    model: str
    fingerprint: str
    tokenizer_fingerprint: str | None
    step_cost_ms: Mapping[int, float]


def served_target(session: ReadSession, now: datetime) -> ServedTarget:
    """What the live replicas say they serve."""
    for replica in replicas.live(session, now, RECENT):
        if fingerprint := replica.stats.get("target_fingerprint"):
            costs = replica.stats.get("step_cost_ms") or {}
            return ServedTarget(
                replica.model,
                str(fingerprint),
                replica.stats.get("tokenizer_fingerprint"),
                {int(rows): float(ms) for rows, ms in costs.items()},
            )
    raise NoTarget("No live replica names the fingerprint of its target model. Start an engine: `slipstream engine`.")


def request_hash(prompt_ids: Sequence[int]) -> int:
    """64 bits of the prompt's tokens, signed as Postgres keeps them."""
    tokens = np.asarray(prompt_ids, "<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(tokens, digest_size=8, person=b"request").digest(), "big", signed=True)


def is_held_out(key: int, share: float) -> bool:
    """Whether a request judges instead of teaching; uniform over hashes."""
    return key % 2**64 < share * 2**64


def take_in(db: Database, gate_share: float) -> int:
    """Take in every trace that was written since; how many. Transactions of bounded size, each its own progress."""
    taken = 0
    while True:
        with db.write() as session:
            rows = intake.take_in(session, request_hash, lambda key: is_held_out(key, gate_share), TAKEN_AT_ONCE)
        taken += len(rows)
        if len(rows) < TAKEN_AT_ONCE:
            return taken


class TraceBuffer:
    """The training traces of one model, at most ``size``. Only what is new in it is read from the database."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._known: dict[int, TrainableTrace] = {}

    def refresh(self, session: ReadSession, model: str) -> tuple[TrainableTrace, ...]:
        """Ascending by ordinal. What has left the buffer, or may no longer be used, is forgotten here too."""
        wanted = buffered(session, model, self.size)
        missing = [ordinal for ordinal in wanted if ordinal not in self._known]
        fresh = {trace.ordinal: trace for trace in intake.load(session, missing)}
        self._known = {o: trace for o in wanted if (trace := fresh.get(o) or self._known.get(o)) is not None}
        return tuple(self._known.values())


def buffered(session: ReadSession, model: str, size: int) -> list[int]:
    """Ordinals of the buffer: the newest half, and an equal sample of each class of what came before."""
    newest = intake.recent(session, model, held_out=False, limit=size - size // 2)
    if len(newest) < size - size // 2:
        return newest  # there is nothing before
    names = intake.classes(session, model, before=newest[0])
    room = size // 2 // max(1, len(names))
    return sorted([*newest, *(o for name in names for o in intake.sample(session, model, name, newest[0], room))])


def held_out(session: ReadSession, model: str, after: int) -> list[int]:
    """Ordinals of the newest held-out traces taken in after an ordinal: those on which no version has passed yet."""
    return intake.recent(session, model, held_out=True, limit=MAX_HELD_OUT, after=after)


def lineage(role: str, traces: Sequence[TrainableTrace]) -> Lineage:
    """Which traces took part in ``role``, for the record."""
    starts = [trace.started_at for trace in traces]
    return Lineage(role, Members.of(t.ordinal for t in traces), min(starts), max(starts), classes(traces))


def classes(traces: Sequence[TrainableTrace]) -> dict[str, int]:
    return dict(sorted(Counter(trace.traffic_class for trace in traces).items()))
