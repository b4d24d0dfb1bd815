"""Two rollouts that are over and one at work, each decision with the evidence of its moment."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from sqlalchemy import update

from engine.contracts import RolloutState, Verdict
from engine.rollout import specs
from engine.rollout.decide import decide
from engine.rollout.launch import launch
from engine.rollout.loading import count, gather, load
from engine.rollout.records import Action, RolloutStatus, Stage, evidence_to_json, status_to_json
from engine.store.database import Database
from engine.store.models import RolloutDecisionRow, RolloutRow, ServingPlanRow
from engine.store.repositories import rollouts
from engine.store.repositories.rollouts import Rollout

Turn = tuple[float, RolloutState, Verdict, Action, str]
RAMPING = RolloutState.RAMPING
PROMOTED: list[Turn] = [
    (12, RAMPING, Verdict.INSUFFICIENT, Action.SET_WEIGHT, "canary v3 to 30 %, an equal control beside it"),
    (18, RAMPING, Verdict.PASS, Action.SET_WEIGHT, "to 50 %: no guard fails; certainly not worse"),
    (23, RolloutState.SOAKING, Verdict.PASS, Action.NONE, "every step passed: no guard fails"),
    (24, RolloutState.PROMOTING, Verdict.PASS, Action.PROMOTE, "soaked for 5 s; no guard fails"),
    (25, RolloutState.DONE, Verdict.PASS, Action.NONE, "v3 is champion and stays"),
]
TAKEN_BACK: list[Turn] = [
    (36, RAMPING, Verdict.INSUFFICIENT, Action.SET_WEIGHT, "canary v4 to 30 %, an equal control beside it"),
    (38, RAMPING, Verdict.INSUFFICIENT, Action.NONE, "14 of 25 requests per arm at this weight"),
    (40, RolloutState.ROLLING_BACK, Verdict.FAIL, Action.ROLL_BACK, "tokens_per_step: the canary is worse"),
    (40.1, RolloutState.ROLLED_BACK, Verdict.FAIL, Action.NONE, "tokens_per_step: the canary is worse"),
]


def roll_out(db: Database, v: list[int], begin: datetime, end: datetime) -> None:
    """Rollouts of v3 (promoted), v4 (taken back) and v5 (at its first weight), as the seeded plans have them."""
    _over(db, v[2], v[1], begin, PROMOTED)
    _over(db, v[3], v[2], begin, TAKEN_BACK)
    began = begin + timedelta(minutes=47)
    spec = replace(specs.preset("fast"), min_requests=120)
    rollout = launch(db, canary=v[4], actor="learner", spec=spec, name=f"v{v[4]}", now=began)
    _served_by(db, rollout, "rollout 3")
    status = RolloutStatus(
        rollout.id, v[4], v[2], RAMPING, began, (Stage(0.3, 7, began),), 7, reason="warming up for 4 s"
    )
    for moment in (*(began + timedelta(seconds=40 * n) for n in range(2, 16)), end):
        status = _tick(db, rollout, status, moment)


def _tick(db: Database, rollout: Rollout, before: RolloutStatus, now: datetime) -> RolloutStatus:
    """One tick of the controller, without the plan it would append: the state stays."""
    spec, _ = load(rollout)
    with db.write() as session:
        count(session, spec, before, db.now())  # all there is: what an earlier look had of it is made below
    with db.read() as session:
        evidence, commands = gather(session, spec, before, now)
    made = decide(spec, before, evidence, commands, now)
    tree = evidence_to_json(evidence, commands, made.guards, before)
    _as_early_as(tree["guards"], (now - before.stage.began) / timedelta(minutes=11))
    status = replace(before, verdict=made.verdict, reason=made.reason)
    with db.write() as session:
        told = (made.verdict, made.reason, Action.NONE)
        session.add(_row(rollout.id, now, RAMPING, RAMPING, *told, before, tree))
        _set(session, rollout.id, status, now)
    return status


def _as_early_as(guards: list[dict], part: float) -> None:  # type: ignore[type-arg]
    """The evidence is that of now; an earlier look had part of the requests and a wider interval."""
    for guard in guards:
        guard["n_canary"], guard["n_control"] = (round(guard[n] * part) for n in ("n_canary", "n_control"))
        if guard["low"] is not None:
            middle, half = (guard["low"] + guard["high"]) / 2, (guard["high"] - guard["low"]) / 2
            guard["low"], guard["high"] = middle - half / part**0.6, middle + half / part**0.6


def _over(db: Database, canary: int, champion: int, begin: datetime, turns: list[Turn]) -> None:
    first = begin + timedelta(minutes=turns[0][0])
    spec = specs.preset("fast")
    with db.write() as session:
        rollout = rollouts.create(
            session,
            name=f"v{canary}",
            spec=specs.to_dict(spec),
            spec_hash=specs.spec_hash(spec),
            canary=canary,
            champion=champion,
            actor="learner",
            state=RolloutState.READY,
            status={},
            created_at=first,
        )
    _served_by(db, rollout, f"rollout {rollout.id}")
    state, stages = RolloutState.READY, []
    status = RolloutStatus(rollout.id, canary, champion, state, first)
    with db.write() as session:
        for minute, following, verdict, action, reason in turns:
            at = begin + timedelta(minutes=minute)
            if action is Action.SET_WEIGHT:
                stages.append(Stage((0.3, 0.5)[len(stages)], 2 + len(stages), at))
            session.add(_row(rollout.id, at, state, following, verdict, reason, action, status, {}))
            status = RolloutStatus(
                rollout.id, canary, champion, following, at, tuple(stages), verdict=verdict, reason=reason
            )
            state = following
        _set(session, rollout.id, status, at)


def _row(rollout_id, at, state, following, verdict, reason, action, before, evidence):  # type: ignore[no-untyped-def]
    return RolloutDecisionRow(
        rollout_id=rollout_id,
        decided_at=at,
        from_state=state.value,
        to_state=following.value,
        verdict=verdict.value,
        reason=reason,
        action=action.value,
        generation=before.generation,
        fencing_token=1,
        status_before=status_to_json(before),
        evidence=evidence,
    )


def _set(session, rollout_id: int, status: RolloutStatus, at: datetime) -> None:  # type: ignore[no-untyped-def]
    session.execute(
        update(RolloutRow)
        .where(RolloutRow.id == rollout_id)
        .values(state=status.state.value, status=status_to_json(status), updated_at=at)
    )


def _served_by(db: Database, rollout: Rollout, actor: str) -> None:
    with db.write() as session:
        session.execute(update(ServingPlanRow).where(ServingPlanRow.actor == actor).values(rollout_id=rollout.id))
