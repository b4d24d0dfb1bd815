"""A small installation in a real database: versions, a ledger, a replica, and requests that were served."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import numpy as np
from sqlalchemy import insert, text

from engine.contracts import CANARY, CONTROL, Objectives, ProposerKind, ReplicaState, ServingPlan, Status, TraceRecord
from engine.routing import assign
from engine.store.database import Database
from engine.store.models import LearningIntakeRow, TracePayloadRow, TraceRow
from engine.store.repositories import ingest, partitions, plans, policies, replicas, shadow
from engine.telemetry import rollup
from engine.telemetry.spill import Batch
from engine.telemetry.writer import _rollup_rows

MODEL = "tiny"
STARTED = datetime(2026, 1, 1, tzinfo=UTC)


def versions(db: Database, count: int) -> list[int]:
    with db.write() as session:
        return [
            policies.register(
                session, digest=f"digest-{n}", kind=ProposerKind.NGRAM, num_speculative_tokens=4, manifest={}
            ).version
            for n in range(count)
        ]


def first_plan(db: Database, champion: int, fallback: int) -> ServingPlan:
    with db.write() as session:
        return plans.append(session, champion=champion, fallback=fallback, actor="engine", reason="first start")


def beat(db: Database, now: datetime, resident: Sequence[int], generation: int | None = None, **stats: object) -> None:
    """A heartbeat of the one replica, routing by ``generation`` or, without it, by the newest plan."""
    with db.write() as session:
        newest = plans.latest(session)
        observed = generation if generation is not None else newest.generation if newest else None
        replicas.beat(
            session, ReplicaState("r0", "http://r0", MODEL, STARTED, now, observed, tuple(resident), dict(stats))
        )


def serve(
    db: Database,
    rng: np.random.Generator,
    began: datetime,
    requests: int,
    acceptance: dict[int, float],
    error_rate: dict[int, float] | None = None,
    traffic_class: str = "chat",
) -> None:
    """Requests routed by the newest plan; ``acceptance``: policy version → accepted tokens per verify step."""
    with db.read() as session:
        plan = plans.latest(session)
    assert plan is not None
    rows = []
    for n in range(requests):
        trace_id = UUID(bytes=rng.bytes(16))
        arm = assign(plan, str(trace_id), traffic_class)
        steps = int(rng.integers(10, 40))
        accepted = int(rng.binomial(steps * 4, acceptance[arm.policy_version] / 4))
        failed = rng.random() < (error_rate or {}).get(arm.policy_version, 0.0)
        rows.append(
            _trace(trace_id, began + timedelta(milliseconds=n), arm.policy_version, traffic_class)
            | {
                "arm": arm.arm,
                "generation": plan.generation,
                "status": "error" if failed else "ok",
                "steps": steps,
                "drafted": 4 * steps,
                "accepted": accepted,
                "cost_s": 0.02 * steps,
            }
        )
    _write(db, began, rows, [])


def draft_in_shadow(
    db: Database, rng: np.random.Generator, generation: int, requests: int, acceptance: dict[int, float]
) -> None:
    """Copies of served requests, drafted on by the champion (the first of ``acceptance``) and the canary beside it."""
    rows = []
    for _ in range(requests):
        trace_id, steps = UUID(bytes=rng.bytes(16)), int(rng.integers(10, 40))
        for arm, (version, accepted) in zip((CONTROL, CANARY), acceptance.items(), strict=True):
            hits = int(rng.binomial(steps * 4, accepted / 4))
            rows.append(
                shadow.ShadowRequest(
                    generation, trace_id, arm, version, "chat", str(trace_id), steps, 4 * steps, hits, draft_s=0.01
                )
            )
    with db.write() as session:
        shadow.write(session, rows)


def remember(
    db: Database,
    began: datetime,
    texts: Sequence[tuple[str, Sequence[int], Sequence[int]]],
    rng: np.random.Generator,
    **columns: object,
) -> list[UUID]:
    """Trainable requests with their tokens: (class, prompt, output)."""
    rows, payloads, ids = [], [], []
    for n, (traffic_class, prompt, output) in enumerate(texts):
        trace_id, at = UUID(bytes=rng.bytes(16)), began + timedelta(milliseconds=n)
        ids.append(trace_id)
        rows.append(_trace(trace_id, at, 1, traffic_class) | {"output_tokens": len(output)} | columns)
        payloads.append(
            {"trace_id": trace_id, "started_at": at, "prompt_ids": list(prompt), "output_ids": list(output)}
            | {name: [] for name in ("proposed", "step_drafted", "step_accepted", "step_emitted")}
        )
    _write(db, began, rows, payloads)
    return ids


def take_in(db: Database, trace_ids: Sequence[UUID], at: datetime, held_out: int = 0) -> list[UUID]:
    """Give traces their ordinals, from 1 on, as the learner would; the last ``held_out`` of them judge."""
    rows = [
        {"ordinal": n, "trace_id": trace_id, "started_at": at, "written_at": at, "model": MODEL, "tenant": None,
         "traffic_class": "chat", "request_hash": n, "held_out": n > len(trace_ids) - held_out, "position": n,
         "max_tokens": 512}
        for n, trace_id in enumerate(trace_ids, start=1)
    ]  # fmt: skip
    with db.write() as session:
        session.execute(insert(LearningIntakeRow), rows)
    return list(trace_ids)


def _trace(trace_id: UUID, at: datetime, version: int, traffic_class: str) -> dict[str, object]:
    return {
        "trace_id": trace_id, "started_at": at, "request_id": str(trace_id), "replica_id": "r0",
        "policy_version": version, "arm": "champion", "generation": 1, "traffic_class": traffic_class,
        "assignment_key": str(trace_id), "tenant": None, "status": "ok", "model": MODEL, "endpoint": "chat",
        "stream": False, "temperature": 0.0, "max_tokens": 512, "ttft_s": 0.1, "tpot_s": 0.02, "e2e_s": 1.0,
        "prompt_tokens": 8, "output_tokens": 40, "steps": 0, "drafted": 0, "accepted": 0,
        "drafted_per_pos": [], "accepted_per_pos": [],
        "prefill_s": 0.0, "draft_s": 0.0, "verify_s": 0.0, "other_s": 0.0,
        "cost_s": 0.0, "plain_s": 0.0, "expected_accepted": 0.0, "retry": 0, "preemptions": 0, "draft_errors": 0,
        "trainable": True,
    }  # fmt: skip


def _write(db: Database, began: datetime, rows: list[dict[str, object]], payloads: list[dict[str, object]]) -> None:
    with db.write() as session:
        for day in {began.astimezone(UTC).date(), (began + timedelta(hours=1)).astimezone(UTC).date()}:
            partitions.ensure(session, day)
        if rows:
            session.execute(insert(TraceRow), [row | {"written_at": row["started_at"]} for row in rows])
            records = tuple(TraceRecord(**row | {"status": Status(row["status"])}) for row in rows)  # type: ignore[arg-type]
            batch = Batch(uuid4(), 0, records)
            ingest.add_rollups(session, *_rollup_rows(batch, rollup.deltas(records, Objectives(1.0, 0.1))))
        if payloads:
            session.execute(insert(TracePayloadRow), payloads)
        session.execute(text("ANALYZE traces"))
