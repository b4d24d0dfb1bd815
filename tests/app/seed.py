"""A database with a believable hour in it: versions, plans, a promotion, a rollback, a canary at work, traces."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

from sqlalchemy import update

from engine.contracts import CANARY, CONTROL, Arm, PolicyVersion, ProposerKind, ReplicaState, ServingPlan, Status
from engine.rollout.launch import launch
from engine.routing import assign
from engine.settings import TelemetrySettings
from engine.store.database import Database
from engine.store.models import ServingPlanRow
from engine.store.repositories import learning, plans, policies, replicas
from engine.store.repositories.learning import Attempt
from engine.store.repositories.policies import Lineage
from engine.telemetry.spill import Batch, Spill
from engine.telemetry.writer import TraceWriter
from tests.telemetry.records import record

MINUTES = 58
PER_MINUTE = 12


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
        if 30 <= (at - begin).total_seconds() / 60 < 33:
            continue  # nothing was served for three minutes: a gap that charts must show
        records.append(_trace(number, at, history, rng))
    writer = TraceWriter(db, Spill(folder, 10**8), TelemetrySettings())
    for seq, start in enumerate(range(0, len(records), 200), start=1):
        writer._transaction(Batch(writer._writer_id, seq, records[start : start + 200]))
    _learned(db, versions, [r.trace_id for r in records[:200]], begin)
    launch(db, canary=versions[4].version, actor="learner", preset="fast", name="v5")
    beat(db, end)
    return versions


def beat(db: Database, at: datetime) -> None:
    """A replica that is alive and has observed the newest plan."""
    with db.write() as session:
        plan = plans.latest(session)
        assert plan is not None
        plans.observe(session, "replica-0", plan.generation, plan.created_at + timedelta(seconds=0.12), 0.0)
        replicas.beat(
            session,
            ReplicaState(
                "replica-0", "http://127.0.0.1:8100", "tiny", at, at, plan.generation, tuple(sorted(plan.versions)), {}
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
        (12, v[1], arms(v[2], v[1], 0.25), "rollout 1", "canary to 25%"),
        (18, v[1], arms(v[2], v[1], 0.5), "rollout 1", "canary to 50%"),
        (24, v[2], (), "rollout 1", "promoted"),
        (36, v[2], arms(v[3], v[2], 0.25), "rollout 2", "canary to 25%"),
        (40, v[2], (), "rollout 2", "tokens_per_step: the canary is worse"),
        (47, v[2], arms(v[4], v[2], 0.25), "rollout 3", "canary to 25%"),
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
            at = begin + timedelta(minutes=minute)
            session.execute(
                update(ServingPlanRow).where(ServingPlanRow.generation == plan.generation).values(created_at=at)
            )


def _trace(number: int, at: datetime, history: list[ServingPlan], rng: random.Random):  # type: ignore[no-untyped-def]
    plan = next((p for p in history if p.created_at <= at), history[-1])
    traffic_class = rng.choices(("chat", "code", "long_form", "batch"), (5, 3, 2, 2))[0]
    given = assign(plan, f"key-{number}", traffic_class)
    rate = _ACCEPTANCE[given.policy_version]
    speed = 1.0 / (1.0 + 2 * rate)
    e2e = speed * rng.lognormvariate({"chat": 0.1, "code": 0.4, "long_form": 0.9, "batch": -0.4}[traffic_class], 0.35)
    steps = rng.randrange(8, 40)
    drafted = steps * 2
    accepted = sum(rng.random() < rate for _ in range(drafted))
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
        ttft_s=0.1 * rng.lognormvariate(0, 0.3),
        e2e_s=0.1 + e2e,
        tpot_s=e2e / (steps + accepted),
        steps=steps,
        drafted=drafted,
        accepted=accepted,
        drafted_per_pos=(steps, steps),
        accepted_per_pos=((accepted + 1) // 2, accepted // 2),
        output_tokens=1 + steps + accepted,
    )


def _learned(db: Database, versions: list[PolicyVersion], traces: list, begin: datetime) -> None:  # type: ignore[type-arg]
    comparison = {"requests": 40, "champion": 1.4, "candidate": 1.9, "low": 0.3, "high": 0.7}
    gate = {"passed": True, "reasons": ["better"], "overall": comparison, "classes": {"chat": comparison}}
    with db.write() as session:
        policies.register(
            session,
            digest=versions[2].digest,
            kind=ProposerKind.TRACE_MEMORY,
            num_speculative_tokens=4,
            manifest={},
            lineage=[Lineage("train", traces, begin, begin + timedelta(minutes=12), {"chat": 120, "code": 80})],
        )
        for outcome, version, reason in (
            ("registered", versions[2].version, "1.9 tokens per verify step against 1.4"),
            ("refused", None, "the lower bound of the change is -0.02: not certainly better"),
        ):
            learning.record(
                session, Attempt(begin, begin, outcome, reason, 200, 40, gate, 0.2, version, versions[1].version)
            )
