"""The tick of a rollout in shadow: the canary drafts on copies of served requests, and no request is given to it. Pure.

The order is that of ``decide``: whoever has taken the shadow away is believed; then the guard; then an abort; then what
ends without blame; only then holds and progress.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Protocol

from engine.contracts import CANARY, RolloutState, Verdict
from engine.percent import percent
from engine.rollout.evaluate import evaluate
from engine.rollout.guards import RolloutSpec, Shadow, TokensPerStep
from engine.rollout.records import Action, Decision, Evidence, GuardResult, RolloutStatus, consuming
from engine.store.repositories.commands import Command


def begin(shadow: Shadow, status: RolloutStatus, command: Command | None, now: datetime) -> Decision:
    """From READY into the shadow; the caller has seen that nothing is missing."""
    why = f"canary v{status.canary} drafts on copies of {shadow.requests} served requests and serves none"
    started = replace(status.moved(RolloutState.SHADOW, now), reason=why, verdict=Verdict.INSUFFICIENT)
    return consuming(Decision(Verdict.INSUFFICIENT, Action.SHADOW, why, started), command)


def decide(
    spec: RolloutSpec, status: RolloutStatus, evidence: Evidence, command: Command | None, now: datetime
) -> Decision:
    """Stay, go on to the first weight, or end. Enough requests without a FAIL go on; a PASS needs no proof here."""
    assert status.shadow is not None
    guards = evaluate(spec, evidence.segments, in_shadow=True)
    verdict, why, enough = _judge(spec, status, evidence, guards)

    def to(state: RolloutState, reason: str, action: Action = Action.NONE, **changes: object) -> Decision:
        moved = replace(status.moved(state, now), verdict=verdict, reason=reason, **changes)  # type: ignore[arg-type]
        return Decision(verdict, action, reason, moved, guards)

    def back(reason: str, ends_as: RolloutState) -> Decision:
        return to(RolloutState.ROLLING_BACK, f"in shadow: {reason}", Action.ROLL_BACK, ends_as=ends_as)

    ledger = evidence.ledger
    if ledger is not None and ledger.canary != status.canary:
        said = f"taken out of its shadow by {ledger.actor}: {ledger.reason}"
        if ledger.champion == status.canary:
            return to(RolloutState.INCONCLUSIVE, f"made champion directly by {ledger.actor}: {ledger.reason}")
        return to(RolloutState.ROLLING_BACK, said, generation=ledger.generation)
    if verdict is Verdict.FAIL:
        return back(why, RolloutState.ROLLED_BACK)
    if command is not None and command.verb == "abort":
        return consuming(back(f"cancelled by {command.actor}: {command.reason}", RolloutState.CANCELLED), command)
    if not evidence.canary_known:
        return back(f"v{status.canary} may not be served any more", RolloutState.CANCELLED)
    if now - status.shadow.began > timedelta(seconds=spec.deadline_s):
        return back(f"not enough requests within {spec.deadline_s:g} s ({why})", RolloutState.INCONCLUSIVE)
    if command is not None:
        return consuming(_obey(status, command, to), command)
    if status.state is RolloutState.HELD:
        return to(RolloutState.HELD, status.reason)
    if not enough:
        return to(RolloutState.SHADOW, why)
    weight = spec.steps[0]
    moved = to(RolloutState.RAMPING, f"to {percent(weight)}, an equal control beside it: {why}", Action.SET_WEIGHT)
    return replace(moved, weight=weight)


class _To(Protocol):
    """The status moved to a state, with the reason and what else changes."""

    def __call__(self, state: RolloutState, reason: str, action: Action = ..., **changes: object) -> Decision: ...


def _obey(status: RolloutStatus, command: Command, to: _To) -> Decision:
    by = f"{command.actor}: {command.reason}"
    if command.verb == "hold":
        return to(RolloutState.HELD, f"held by {by}", held_by="operator", resumes_to=RolloutState.SHADOW)
    if command.verb == "resume":
        return to(RolloutState.SHADOW, f"resumed by {by}", held_by="", resumes_to=None)
    return to(status.state, f"{command.verb} refused ({command.actor}): the canary has served no request yet")


def _judge(
    spec: RolloutSpec, status: RolloutStatus, evidence: Evidence, guards: tuple[GuardResult, ...]
) -> tuple[Verdict, str, bool]:
    """(verdict, why, whether that is enough to go on)."""
    assert spec.shadow is not None
    assert status.shadow is not None
    if failed := [g for g in guards if g.verdict is Verdict.FAIL]:
        return Verdict.FAIL, "; ".join(f"{g.guard}: {g.reason}" for g in failed), False
    if evidence.fault is not None:
        return Verdict.ERROR, evidence.fault, False
    for replica in evidence.alive:
        if replica.load_error:
            return Verdict.ERROR, f"{replica.replica_id} could not load all of the plan: {replica.load_error}", False
    behind = [r.replica_id for r in evidence.alive if (r.observed_generation or 0) < status.shadow.generation]
    if not evidence.alive or behind:
        return Verdict.INSUFFICIENT, f"waiting for {', '.join(behind) or 'a replica'} to load v{status.canary}", False
    seen = next((s for s in evidence.segments if s.arm == CANARY and s.traffic_class is None), None)
    requests = seen.requests if seen is not None else 0
    earned = "".join(
        f", {g.canary:.3f} tokens per verify step against {g.control:.3f}"
        for g in guards
        if g.guard == TokensPerStep.kind and g.canary is not None and g.control is not None and requests
    )
    enough = requests >= spec.shadow.requests
    why = f"{requests} of {spec.shadow.requests} requests drafted in shadow, none served{earned}"
    return Verdict.PASS if enough else Verdict.INSUFFICIENT, why, enough
