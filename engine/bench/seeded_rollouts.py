"""A history of rollouts for benchmarks that look at many traces: simulated, decided by the real ``decide``, and written
as the controller writes them, each decision with the counts it was made of."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from engine.bench.rollout_simulation import Simulation
from engine.bench.rollout_world import Regression, World, looks
from engine.contracts import TERMINAL_STATES, RolloutState
from engine.rollout import specs
from engine.rollout.records import Evidence, RolloutStatus, evidence_to_json, status_to_json
from engine.store.database import Database, WriteSession
from engine.store.repositories import rollouts
from engine.store.repositories.rollouts import DecisionRecord
from engine.store.segments import Counts

EQUAL, WORSE = World("equal"), World("worse", Regression(acceptance=-0.1))
PAST = (EQUAL, EQUAL, WORSE, EQUAL, WORSE)
EVERY = timedelta(days=5)
HORIZON, STEP = 6_000, 40
"""Requests per arm, and between two looks at most."""
AT_WORK = timedelta(minutes=15)
"""So long ago the newest began: it is not over."""


def write(database: Database, end: datetime, newest: int, seed: int) -> int:
    """Rollouts of the versions up to ``newest``, one in five days, and one at work at ``end``; how many decisions.

    The versions must be there. The ledger is left alone: an engine would load and serve what it names, which
    ``seeded_plan`` lets it where it can.
    """
    many = 0
    for number, world in enumerate((*PAST, EQUAL)):
        back = len(PAST) - number
        began = end - back * EVERY if back else end - AT_WORK
        with database.write() as session:
            many += _one(session, world, newest - back, began, end, seed + number)
    return many


def _one(session: WriteSession, world: World, canary: int, began: datetime, end: datetime, seed: int) -> int:
    """One rollout from its start to its end, or to ``end``; how many decisions."""
    spec, champion = specs.preset("standard"), canary - 1
    made = rollouts.create(
        session,
        name=f"v{canary}",
        spec=specs.to_dict(spec),
        spec_hash=specs.spec_hash(spec),
        canary=canary,
        champion=champion,
        actor="bench",
        state=RolloutState.READY,
        status={},
        created_at=began,
    )
    ready = RolloutStatus(made.id, canary, champion, RolloutState.READY, began)
    run, before, many = Simulation(world, seed, looks(HORIZON, STEP), status=ready), ready, 0
    while True:
        decision = DecisionRecord(
            rollout_id=made.id,
            decided_at=run.now,
            from_state=before.state,
            to_state=run.status.state,
            verdict=run.decision.verdict,
            reason=run.decision.reason,
            action=run.decision.action.value,
            generation=run.status.generation,
            command_id=None,
            fencing_token=1,
            status_before=status_to_json(before),
            evidence=evidence_to_json(_in_lists(run.evidence), (), run.decision.guards, before),
        )
        rollouts.apply(
            session,
            made.id,
            expected=before.state,
            state=run.status.state,
            status=status_to_json(run.status),
            decision=decision,
            now=run.now,
        )
        before, many = run.status, many + 1
        if before.state in TERMINAL_STATES or run.now >= end or many > len(run.looks):
            return many
        run.step(many - 1)


def _in_lists(evidence: Evidence) -> Evidence:
    """Histograms as a query gives them: the simulation's are arrays."""
    segments = []
    for segment in evidence.segments:
        latencies: dict[str, Counts] = {
            name: (list(map(int, at)), list(map(float, n))) for name, (at, n) in segment.latencies.items()
        }
        segments.append(replace(segment, latencies=latencies))
    return replace(evidence, segments=tuple(segments))
