"""A dry run on what the database holds: what the champion served of late, and the rollouts that are over."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from engine.contracts import TERMINAL_STATES
from engine.rollout import dry_run
from engine.rollout.dry_run import Equal, Found, Incident
from engine.rollout.guards import RolloutSpec
from engine.store.database import Database
from engine.store.repositories import evidence, plans, rollouts

PLANTED_SPLITS = 7


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What guards did on the past; ``equal`` is None where the champion has served nothing to try them on."""

    equal: Equal | None
    found: tuple[Found, ...]
    incidents: tuple[Incident, ...]


def rehearse(
    database: Database,
    spec: RolloutSpec,
    since: datetime,
    splits: int = 40,
    requests: int = 20_000,
    incidents: int = 200,
) -> Rehearsal:
    """Try ``spec`` on the newest ``requests`` of the champion since then, split in so many ways, and on the newest
    ``incidents``: rollouts that began since then and are over."""
    with database.read() as session:
        plan, past = plans.latest(session), None
        if plan is not None:
            past = evidence.past(session, plan.champion, since, spec.traffic_classes, spec.tenants, requests)
        over = [r for r in rollouts.list_rollouts(session) if r.state in TERMINAL_STATES and r.created_at >= since]
        retold = tuple(
            dry_run.incident(spec, r.id, r.state.value, rollouts.decisions(session, r.id)) for r in over[:incidents]
        )
    if past is None or not past.requests:
        return Rehearsal(None, (), retold)
    equal = dry_run.equal_arms(spec, past, splits)
    return Rehearsal(equal, tuple(dry_run.planted(spec, past, min(splits, PLANTED_SPLITS))), retold)
