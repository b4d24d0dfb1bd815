"""A database with a believable hour in it: versions, plans, a promotion, a rollback, a canary at work, traces."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import insert, text, update

from engine.contracts import (
    CANARY,
    CONTROL,
    Arm,
    PolicyVersion,
    ProposerKind,
    ReplicaState,
    ServingPlan,
    SpecCounts,
    Status,
    TraceRecord,
)
from engine.routing import assign
from engine.settings import TelemetrySettings
from engine.store.database import Database
from engine.store.members import Members
from engine.store.models import PolicyLineageRow, PolicyVersionRow, ServingPlanRow
from engine.store.repositories import learning, plans, policies, replicas
from engine.store.repositories.learning import Attempt
from engine.telemetry.spill import Batch, Spill
from engine.telemetry.writer import TraceWriter
from tests.app.seed_rollouts import roll_out
from tests.app.seed_text import response, write_tokenizer
from tests.rollout.database_world import take_in
from tests.telemetry.records import record

STARTED = datetime(2026, 1, 1, tzinfo=UTC)
MINUTES = 118
PER_MINUTE = 20
"""Requests a minute in the last hour; half as many before."""
QUIET = 60
"""Minutes at the beginning in which nothing changed: what the last hour is compared with."""


def seed(db: Database, folder: Path, now: datetime | None = None) -> list[PolicyVersion]:
    """Fill an empty migrated database; the versions made, oldest first."""
    end = now or datetime.now(UTC)
    begin = end - timedelta(minutes=MINUTES)
    versions = [_version(db, kind, parent) for kind, parent in _KINDS]
    _plans(db, [v.version for v in versions], begin)
    with db.read() as session:
        history = plans.history(session)
    rng = random.Random(7)
    records = []
    for number in range(MINUTES * PER_MINUTE):
        at = begin + timedelta(seconds=number * 60 / PER_MINUTE)
        minute = (at - begin).total_seconds() / 60
        if minute < QUIET and number % 2:
            continue
        if 29 <= minute - QUIET < 35:
            continue  # nothing was served for six minutes: a gap that charts must show
        records.append(_trace(number, at, history, rng))
    writer = TraceWriter(db, Spill(folder, 10**8), TelemetrySettings())
    for seq, start in enumerate(range(0, len(records), 200), start=1):
        writer._transaction(Batch(writer._writer_id, seq, records[start : start + 200]))
    changed = begin + timedelta(minutes=QUIET)
    _learned(db, versions, [r.trace_id for r in records[-1500:-1300]], changed)
    write_tokenizer(folder / "tokenizer.json")
    beat(db, end, tokenizer=folder / "tokenizer.json")
    roll_out(db, [v.version for v in versions], changed, end)
    return versions


def beat(db: Database, at: datetime, tokenizer: Path | None = None) -> None:
    """A replica that is alive and has observed the newest plan."""
    stats = {"tokenizer": str(tokenizer)} if tokenizer else {}
    with db.write() as session:
        plan = plans.latest(session)
        assert plan is not None
        plans.observe(session, "replica-0", plan.generation, plan.created_at + timedelta(seconds=0.12), 0.0)
        replicas.beat(
            session,
            ReplicaState(
                "replica-0",
                "http://127.0.0.1:8100",
                "tiny",
                STARTED,
                at,
                plan.generation,
                tuple(sorted(plan.versions)),
                stats,
            ),
        )


_KINDS = [
    (ProposerKind.NONE, None),
    (ProposerKind.NGRAM, None),
    (ProposerKind.TRACE_MEMORY, 2),
    (ProposerKind.TRACE_MEMORY, 3),
    (ProposerKind.TRACE_MEMORY, 3),
]
_ACCEPTANCE = {1: 0.0, 2: 0.25, 3: 0.5, 4: 0.05, 5: 0.6}


def _version(db: Database, kind: ProposerKind, parent: int | None) -> PolicyVersion:
    with db.write() as session:
        return policies.register(
            session,
            digest=uuid4().hex * 2,
            kind=kind,
            num_speculative_tokens=4,
            manifest={"kind": kind.value},
            parent_version=parent,
        )


def _plans(db: Database, v: list[int], begin: datetime) -> None:
    """ngram, a canary that is promoted, a bad one that is taken back, and one at work."""

    def arms(canary: int, control: int, weight: float) -> tuple[Arm, ...]:
        return (Arm(CANARY, canary, weight), Arm(CONTROL, control, weight))

    turns: list[tuple[int, int, tuple[Arm, ...], str, str]] = [
        (0, v[1], (), "engine", "first start"),
        (12, v[1], arms(v[2], v[1], 0.3), "rollout 1", "canary to 30 %"),
        (18, v[1], arms(v[2], v[1], 0.5), "rollout 1", "canary to 50 %"),
        (24, v[2], (), "rollout 1", "promoted"),
        (36, v[2], arms(v[3], v[2], 0.3), "rollout 2", "canary to 30 %"),
        (40, v[2], (), "rollout 2", "tokens_per_step: the canary is worse"),
        (47, v[2], arms(v[4], v[2], 0.3), "rollout 3", "canary to 30 %"),
    ]
    for minute, champion, split, actor, reason in turns:
        with db.write() as session:
            plan = plans.append(
                session,
                champion=champion,
                fallback=v[0],
                arms=split,
                rollback_to=champion if split else None,
                salt="seed",
                actor=actor,
                reason=reason,
            )
            at = begin + timedelta(minutes=minute + (QUIET if minute else 0))
            session.execute(
                update(ServingPlanRow).where(ServingPlanRow.generation == plan.generation).values(created_at=at)
            )


def _trace(number: int, at: datetime, history: list[ServingPlan], rng: random.Random) -> TraceRecord:
    plan = next((p for p in history if p.created_at <= at), history[-1])
    traffic_class = rng.choices(("chat", "code", "long_form", "batch"), (5, 3, 2, 2))[0]
    given = assign(plan, f"key-{number}", traffic_class)
    payload = response(traffic_class, rng.randrange(24, 90), _ACCEPTANCE[given.policy_version], rng)
    counts = SpecCounts()
    for step in payload.steps:
        counts.add(step)
    ttft = 0.09 * rng.lognormvariate(0, 0.3)
    decode = 0.024 * len(payload.steps) * rng.lognormvariate(0, 0.12) * (2.2 if rng.random() < 0.03 else 1.0)
    output = len(payload.output_ids)
    return record(
        number,
        seed=3,
        started_at=at,
        policy_version=given.policy_version,
        arm=given.arm,
        generation=given.generation,
        traffic_class=traffic_class,
        status=Status.ERROR if rng.random() < 0.004 else Status.OK,
        retry=int(rng.random() < 0.02),
        queue_s=0.01,
        prefill_s=ttft - 0.012,
        ttft_s=ttft,
        e2e_s=ttft + decode,
        tpot_s=decode / max(output - 1, 1),
        draft_s=decode * 0.06,
        verify_s=decode * 0.9,
        steps=counts.steps,
        drafted=counts.drafted,
        accepted=counts.accepted,
        drafted_per_pos=tuple(counts.drafted_per_pos),
        accepted_per_pos=tuple(counts.accepted_per_pos),
        prompt_tokens=len(payload.prompt_ids),
        output_tokens=output,
        payload=payload,
    )


_AS_SERVED = """
    UPDATE learning_intake i SET started_at = t.started_at, tenant = t.tenant, traffic_class = t.traffic_class
    FROM traces t WHERE t.trace_id = i.trace_id
"""


def _learned(db: Database, versions: list[PolicyVersion], traces: list[UUID], begin: datetime) -> None:
    """Lineage of the learned versions, and the learner's attempts: three that passed the gate and one refused."""
    mixes = {
        "train": {"chat": 66, "code": 38, "long_form": 26, "batch": 20},
        "gate": {"chat": 22, "code": 12, "long_form": 8, "batch": 8},
    }
    taught, judged = (sum(mix.values()) for mix in mixes.values())
    attempts = (
        (12, versions[2], versions[1], 1.45, 0.50),
        (30, None, versions[2], 1.95, -0.04),
        (35, versions[3], versions[2], 1.97, 0.12),
        (46, versions[4], versions[2], 1.95, 0.31),
    )
    used = take_in(db, traces[: taught + judged], begin, held_out=judged)
    members = {
        "train": Members.of(range(1, taught + 1)),
        "gate": Members.of(range(taught + 1, len(used) + 1)),
    }
    with db.write() as session:
        session.execute(text(_AS_SERVED))
        for minute, made, parent, was, gain in attempts:
            at = begin + timedelta(minutes=minute)
            gate = _gate(mixes["gate"], was, gain, made is not None)
            if made is not None:
                session.execute(
                    insert(PolicyLineageRow),
                    [
                        {"version": made.version, "role": role, "chunks": list(members[role].chunks),
                         "bits": members[role].bits, "window_from": begin,
                         "window_to": at, "classes": mix}
                        for role, mix in mixes.items()
                    ],
                )  # fmt: skip
                policies.set_mlflow(session, made.version, str(made.version - 2), f"run{made.version}")
                session.execute(
                    update(PolicyVersionRow).where(PolicyVersionRow.version == made.version).values(created_at=at)
                )
            outcome = "registered" if made is not None else "refused"
            version = made.version if made is not None else None
            reason = gate["reasons"][0]
            learning.record(
                session,
                Attempt(at, at, outcome, reason, taught, judged, gate, 0.42, version, parent.version,
                        learn_cpu_s=0.24, gate_cpu_s=0.15, export_cpu_s=0.02),
            )  # fmt: skip


def _gate(mix: dict[str, int], was: float, gain: float, passed: bool) -> dict[str, Any]:
    """A gate's report: each class gains its part, and the sentence says what the numbers say."""

    def comparison(n: int, before: float, delta: float, half: float) -> dict[str, float]:
        return {"n": n, "champion": before, "candidate": before + delta, "delta": delta,
                "low": delta - half, "high": delta + half, "champion_ms": 40.0 / before,
                "candidate_ms": 41.0 / (before + delta)}  # fmt: skip

    parts = zip(mix.items(), (0.95, 1.17, 0.9, 1.0), (1.0, 1.3, 0.6, 0.9), strict=True)
    classes = {name: comparison(n, was * level, gain * part, 0.1) for (name, n), level, part in parts}
    overall = comparison(sum(mix.values()), was, gain, 0.04)
    reason = (
        f"{was + gain:.2f} tokens per verify step against {was:.2f}"
        if passed
        else f"the lower bound of the change is {overall['low']:.2f}: not certainly better"
    )
    return {"passed": passed, "reasons": [reason], "overall": overall, "classes": classes}
