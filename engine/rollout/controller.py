"""The controller: load, decide, apply. It keeps nothing that matters in memory; any number may run, one acts.

A tick reads the rollout, its evidence and what was asked of it, decides purely, and writes status, decision and plan in
one transaction that first checks its lease with the fencing token. Whatever happens in between, either all of it is
there or none, and the next tick starts from what is there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy.exc import SQLAlchemyError

from engine.contracts import CANARY, CONTROL, SHADOW, Arm, RolloutState, ServingPlan, SlipstreamError, Verdict
from engine.rollout import notify
from engine.rollout.decide import decide
from engine.rollout.guards import RolloutSpec
from engine.rollout.launch import launch
from engine.rollout.loading import Untrusted, count, gather, load, unmeasured
from engine.rollout.records import (
    Action,
    Decision,
    Evidence,
    Ledger,
    RolloutStatus,
    evidence_to_json,
    status_to_json,
    with_plan,
)
from engine.settings import Settings
from engine.store.database import Database, WriteSession
from engine.store.repositories import compared, eligibility, learning, leases, plans, replicas, rollouts
from engine.store.repositories.commands import Command
from engine.store.repositories.rollouts import DecisionRecord, Rollout

LEASE = "rollout-controller"
REPEAT_S = 15.0
"""A decision that repeats the last one is written this often, not on every tick."""
log = logging.getLogger(__name__)
Clock = Callable[[], datetime]


def run(settings: Settings, db: Database, stop: threading.Event, clock: Clock | None = None) -> None:
    """Tick until ``stop`` is set, by the database's clock unless another is given. What fails is tried again."""
    clock = clock or db.now
    holder = leases.new_holder()
    controller = Controller(db, holder, settings.rollout.lease_s)
    telling = threading.Thread(
        target=notify.run, args=(settings.rollout, db, holder, stop, clock), name="notify", daemon=True
    )
    telling.start()
    while not stop.is_set():
        try:
            if settings.learner.auto_rollout:
                launch_awaiting(db, settings.rollout.preset, clock())
            controller.tick(clock())
        except (SlipstreamError, SQLAlchemyError) as error:
            log.error("tick failed, trying again: %s", error)
        except Exception:
            log.exception("tick failed in a way nobody foresaw, trying again")
        stop.wait(settings.rollout.tick_s)
    try:
        controller.release(clock())
    except SQLAlchemyError as error:
        log.warning("the lease could not be released, it ends by itself: %s", error)


def launch_awaiting(db: Database, preset: str, now: datetime) -> Rollout | None:
    """Start a rollout of the version that passed its gate last, if it is untried and nothing else runs."""
    with db.read() as session:
        plan = plans.latest(session)
        if plan is None or rollouts.active(session) is not None:
            return None
        version = learning.awaiting_rollout(session, plan.champion)
    if version is None:
        return None
    made = launch(db, canary=version, actor="learner", preset=preset, now=now)
    log.info("rollout %d of v%d against v%d: %s", made.id, made.canary, made.champion, preset)
    return made


class Controller:
    """One candidate for the lease. ``tick`` does nothing while another holds it."""

    def __init__(self, db: Database, holder: str, lease_s: float) -> None:
        self.db, self.holder, self.lease_s = db, holder, lease_s
        self._written: tuple[object, datetime] | None = None  # what the last decision row said, and when

    def tick(self, now: datetime) -> Decision | None:
        """Decide once on the active rollout; None when there is none or the lease is another's."""
        with self.db.write() as session:
            token = leases.acquire(session, LEASE, self.holder, now, self.lease_s)
        if token is None:
            return None
        with self.db.read() as session:
            rollout = rollouts.active(session)
        if rollout is None:
            with self.db.write() as session:
                leases.check(session, LEASE, self.holder, token)  # or it deletes what the next holder has counted
                compared.forget(session, None)
            return None
        try:
            spec, status = load(rollout)
        except Untrusted as error:
            self._give_up(rollout, str(error), token, now)
            return None
        uncounted = self._count(spec, status, token, now)
        with self.db.read() as session:
            evidence, commands = gather(session, spec, status, now, uncounted)
        try:
            decision = decide(spec, status, evidence, commands, now)
        except Exception as error:  # counts that no guard can judge leave the canary as unguarded as none
            evidence = unmeasured(status, evidence, error)
            decision = decide(spec, status, evidence, commands, now)
        self.apply(spec, status, evidence, commands, decision, token, now)
        return decision

    def _count(self, spec: RolloutSpec, status: RolloutStatus, token: int, now: datetime) -> str | None:
        """Count what came since the last tick, only while the lease is ours; why that did not succeed, if so."""
        try:
            with self.db.write() as session:
                leases.check(session, LEASE, self.holder, token)
                return count(session, spec, status, now)
        except leases.LeaseLost:
            raise
        except Exception as error:  # a fault of any kind must reach ``decide``, which ends what is unguarded
            said = str(error).strip().splitlines() or [""]
            log.error("rollout %d: requests could not be counted: %s", status.rollout_id, error)
            return f"the traffic could not be measured: {type(error).__name__}: {said[0]}"

    def apply(
        self,
        spec: RolloutSpec,
        before: RolloutStatus,
        evidence: Evidence,
        commands: tuple[Command, ...],
        decision: Decision,
        token: int,
        now: datetime,
    ) -> None:
        """Status, decision and plan, all or nothing, and only while the lease is ours.

        LeaseLost when it is not; StalePlan when the ledger moved since it was read. Both leave everything as it was.
        """
        says = (decision.status.rollout_id, decision.to_state, decision.verdict, decision.action)
        repeats = (
            before.state is decision.to_state
            and decision.action is Action.NONE
            and decision.command_id is None
            and self._written is not None
            and self._written[0] == says
            and now - self._written[1] < timedelta(seconds=REPEAT_S)
        )
        if repeats and decision.status == before:
            return
        with self.db.write() as session:
            leases.check(session, LEASE, self.holder, token)
            status = decision.status
            if decision.action is not Action.NONE:
                assert evidence.ledger is not None
                plan = append_plan(session, spec, decision, evidence.ledger)
                status = with_plan(decision, plan.generation, plan.created_at)
            record = DecisionRecord(
                rollout_id=status.rollout_id,
                decided_at=now,
                from_state=before.state,
                to_state=status.state,
                verdict=decision.verdict,
                reason=decision.reason,
                action=decision.action.value,
                generation=status.generation,
                command_id=decision.command_id,
                fencing_token=token,
                status_before=status_to_json(before),
                evidence=evidence_to_json(evidence, commands, decision.guards, status),
            )
            rollouts.apply(
                session,
                status.rollout_id,
                expected=before.state,
                state=status.state,
                status=status_to_json(status),
                decision=None if repeats else record,
                now=now,
            )
        if not repeats:
            self._written = (says, now)
            log.info("rollout %d: %s → %s, %s: %s", status.rollout_id, before.state, status.state, *_said(decision))

    def _give_up(self, rollout: Rollout, fault: str, token: int, now: datetime) -> None:
        """A rollout whose guards cannot be trusted must not serve: its canary goes back, and nobody is blamed.

        INCONCLUSIVE once no replica can route by an older plan, as after every rollback.
        """
        with self.db.write() as session:
            leases.check(session, LEASE, self.holder, token)
            plan = plans.latest(session)
            ours = plan if plan is not None and plan.rollout_id == rollout.id else None
            serving = ours is not None and (bool(ours.arms) or ours.champion == rollout.canary)
            if plan is not None and not serving:
                seen = [replica.observed_generation or 0 for replica in replicas.may_serve(session, now)]
                if rollout.state is RolloutState.ROLLING_BACK and min(seen, default=plan.generation) < plan.generation:
                    return
            ends = RolloutState.ROLLING_BACK if serving else RolloutState.INCONCLUSIVE
            if plan is not None and serving:
                plan = plans.append(
                    session,
                    champion=eligibility.standing(session, rollout.champion, plan.fallback, without=(rollout.canary,)),
                    fallback=plan.fallback,
                    salt=plan.salt,
                    rollout_id=rollout.id,
                    actor=f"rollout {rollout.id}",
                    reason=fault,
                )
            record = DecisionRecord(
                rollout_id=rollout.id,
                decided_at=now,
                from_state=rollout.state,
                to_state=ends,
                verdict=Verdict.ERROR,
                reason=fault,
                action=(Action.ROLL_BACK if serving else Action.NONE).value,
                generation=plan.generation if plan is not None else None,
                command_id=None,
                fencing_token=token,
                status_before=rollout.status,
                evidence={},
            )
            rollouts.apply(
                session,
                rollout.id,
                expected=rollout.state,
                state=ends,
                status=rollout.status | {"state": ends.value, "reason": fault},
                decision=record,
                now=now,
            )
        log.error("rollout %d: %s", rollout.id, fault)

    def release(self, now: datetime) -> None:
        with self.db.write() as session:
            leases.release(session, LEASE, self.holder, now)


def append_plan(session: WriteSession, spec: RolloutSpec, decision: Decision, ledger: Ledger) -> ServingPlan:
    """The plan that a decision asks for.

    The champion of a rollback is the one recorded when the rollout began or, where that was retired meanwhile, its
    nearest ancestor that may be served: a rollback is never refused.
    """
    status = decision.status
    champion, arms, rollback_to = status.champion, (), status.champion  # type: int, tuple[Arm, ...], int | None
    if decision.action is Action.SHADOW:
        arms = (Arm(SHADOW, status.canary, 0.0),)
    if decision.action in (Action.SET_WEIGHT, Action.PROMOTE) and decision.weight:
        arms = (Arm(CANARY, status.canary, decision.weight), Arm(CONTROL, status.champion, decision.weight))
    if decision.action in (Action.PROMOTE, Action.SETTLE):
        champion = status.canary
    if decision.action is Action.SETTLE:  # whoever was retired while it was the control is no way back
        rollback_to = eligibility.standing(session, status.champion, ledger.fallback, without=(status.canary,))
    if decision.action is Action.ROLL_BACK:
        champion = eligibility.standing(session, status.champion, ledger.fallback, without=(status.canary,))
        rollback_to = None
    return plans.append(
        session,
        champion=champion,
        fallback=ledger.fallback,
        arms=arms,
        salt=f"rollout-{status.rollout_id}",
        traffic_classes=spec.traffic_classes,
        tenants=spec.tenants,
        slices=spec.slices,
        rollback_to=rollback_to,
        rollout_id=status.rollout_id,
        actor=f"rollout {status.rollout_id}",
        reason=decision.reason,
        expected_generation=ledger.generation,
    )


def _said(decision: Decision) -> tuple[str, str]:
    return decision.verdict.value, decision.reason
