"""What a candidate learns from and what it is judged on: recent finished responses, split once and for ever.

The split is by hash of the trace id, the same for every candidate, so a trace that judges has never taught anybody:
neither this candidate nor the champion it is compared with.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from engine.contracts import SlipstreamError
from engine.store.database import ReadSession
from engine.store.repositories import learning, replicas
from engine.store.repositories.learning import TrainableTrace
from engine.store.repositories.policies import Lineage

RECENT = timedelta(seconds=60)
"""A replica that has not spoken for longer no longer says which target is served."""
MAX_HELD_OUT = 256
"""The gate replays at most this many held-out requests, the newest: it must not cost what it saves."""


class NoTarget(SlipstreamError):
    """No live replica says which target model it serves, so nothing can be learned for it."""


@dataclass(frozen=True, slots=True)
class ServedTarget:
    """The model whose drafts are learned. ``step_cost_ms``: rows in one target pass → milliseconds, {} if unknown."""

    model: str
    fingerprint: str
    tokenizer_fingerprint: str | None
    step_cost_ms: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Split:
    """Newest first, both. ``held_out`` is for the gate."""

    train: tuple[TrainableTrace, ...]
    held_out: tuple[TrainableTrace, ...]


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


def load(session: ReadSession, model: str, window: int, gate_share: float) -> Split:
    """The newest ``window`` trainable traces of ``model``, split."""
    found = learning.recent_trainable(session, model, window)
    train, held_out = list[TrainableTrace](), list[TrainableTrace]()
    for trace in found:
        (held_out if is_held_out(trace.trace_id, gate_share) else train).append(trace)
    return Split(tuple(train), tuple(held_out[:MAX_HELD_OUT]))


def is_held_out(trace_id: UUID, share: float) -> bool:
    """Whether a trace judges instead of teaching; uniform over ids, whatever way they were made."""
    digest = hashlib.blake2b(trace_id.bytes, digest_size=8, person=b"gate").digest()
    return int.from_bytes(digest, "big") < share * 2**64


def lineage(role: str, traces: Sequence[TrainableTrace]) -> Lineage:
    """Which traces took part in ``role``, for the record."""
    starts = [trace.started_at for trace in traces]
    return Lineage(role, [t.trace_id for t in traces], min(starts), max(starts), classes(traces))


def classes(traces: Sequence[TrainableTrace]) -> dict[str, int]:
    return dict(sorted(Counter(trace.traffic_class for trace in traces).items()))
