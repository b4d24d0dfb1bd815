"""A candidate policy: the trace memory of the training traces, with a manifest that says what it was made of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from engine.contracts import ProposerKind, SlipstreamError
from engine.learner import traces
from engine.learner.traces import ServedTarget
from engine.settings import LearnerSettings, Settings
from engine.speculation.artifact import build_artifact
from engine.speculation.memory import MEMORY_FILE, TraceMemoryBuilder
from engine.store.database import Database
from engine.store.repositories import plans, policies
from engine.store.repositories.learning import TrainableTrace


def build_memory(
    train: Sequence[TrainableTrace], target: ServedTarget, settings: LearnerSettings, parent: str | None = None
) -> dict[str, bytes]:
    """The files of a trace-memory policy. The same traces give the same bytes, whenever and wherever.

    The ids of the traces go to ``policy_lineage``; the manifest keeps their digest, so that the two can be compared.
    """
    if not train:
        raise SlipstreamError("There is no trace to learn from: no trainable request with its tokens in the window.")
    builder = TraceMemoryBuilder()
    for trace in train:
        builder.add(trace.traffic_class, trace.prompt_ids, trace.output_ids)
    used = traces.lineage("train", train)
    return build_artifact(
        ProposerKind.TRACE_MEMORY,
        settings.num_speculative_tokens,
        files={MEMORY_FILE: builder.build(settings.memory_max_bytes)},
        target_fingerprint=target.fingerprint,
        tokenizer_fingerprint=target.tokenizer_fingerprint,
        parent=parent,
        lineage={
            "traces": len(train),
            "trace_ids_sha256": hashlib.sha256(b"".join(sorted(i.bytes for i in used.trace_ids))).hexdigest(),
            "window_from": used.window_from.astimezone(UTC).isoformat(),
            "window_to": used.window_to.astimezone(UTC).isoformat(),
            "classes": dict(used.classes),
            "code": f"slipstream {version('slipstream')}",
        },
    )


def build_candidate(settings: Settings, db: Database, now: datetime | None = None) -> dict[str, bytes]:
    """What the learner would propose from the newest traces, without a gate."""
    with db.read() as session:
        target = traces.served_target(session, now or datetime.now(UTC))
        split = traces.load(session, target.model, settings.learner.window_requests, settings.learner.gate_share)
        plan = plans.latest(session)
        parent = policies.get(session, plan.champion) if plan is not None else None
    return build_memory(split.train, target, settings.learner, parent.digest if parent else None)
