"""The tick of a rollout that has served nobody yet: it starts when everything a rollback needs is in place. Pure."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from engine.contracts import RolloutState, Verdict
from engine.percent import percent
from engine.rollout import shadow
from engine.rollout.guards import RolloutSpec
from engine.rollout.records import Action, Decision, Evidence, RolloutStatus, consuming
from engine.store.repositories.commands import Command


def decide(
    spec: RolloutSpec, status: RolloutStatus, evidence: Evidence, command: Command | None, now: datetime
) -> Decision:
    """Wait, start, or end: READY, and a hold before traffic."""

    def stay(state: RolloutState, why: str, **changes: object) -> Decision:
        moved = replace(status.moved(state, now), reason=why, **changes)  # type: ignore[arg-type]
        decision = Decision(Verdict.INSUFFICIENT, Action.NONE, why, moved)
        return consuming(decision, command)

    if command is not None and command.verb == "abort":
        return stay(RolloutState.CANCELLED, f"cancelled by {command.actor}: {command.reason}")
    ledger = evidence.ledger
    if ledger is not None and ledger.champion != status.champion:
        return stay(
            RolloutState.CANCELLED,
            f"v{ledger.champion} is champion now, the rollout was made against v{status.champion}",
        )
    if now - (status.asked_at or status.since) > timedelta(seconds=spec.deadline_s):
        return stay(
            RolloutState.INCONCLUSIVE,
            f"did not start within {spec.deadline_s:g} s ({status.reason}): nobody was served",
        )
    if command is not None and command.verb == "hold":
        return stay(RolloutState.HELD, f"held by {command.actor}: {command.reason}", held_by="operator")
    if command is not None and command.verb == "promote":
        return stay(status.state, f"promotion refused ({command.actor}): the canary has served no request yet")
    if status.state is RolloutState.HELD:
        if command is None:
            return stay(status.state, status.reason)
        return stay(RolloutState.READY, f"released by {command.actor}: {command.reason}", held_by="")
    if (missing := _missing(status, evidence)) is not None:
        return stay(RolloutState.READY, missing)
    if spec.shadow is not None:
        return shadow.begin(spec.shadow, status, command, now)
    weight = spec.steps[0]
    why = f"canary v{status.canary} to {percent(weight)}, an equal control beside it"
    started = replace(status.moved(RolloutState.RAMPING, now), reason=why, verdict=Verdict.INSUFFICIENT)
    return consuming(Decision(Verdict.INSUFFICIENT, Action.SET_WEIGHT, why, started, weight=weight), command)


def _missing(status: RolloutStatus, evidence: Evidence) -> str | None:
    """The first precondition of traffic that does not hold: a rollback must never have to load anything."""
    ledger = evidence.ledger
    if ledger is None:
        return "there is no serving plan yet"
    if ledger.canary is not None:
        return f"the ledger carries another canary, v{ledger.canary}"
    if not evidence.canary_known:
        return f"there is no policy version {status.canary} that may be served"
    if not evidence.alive:
        return "no replica is alive"
    for replica in evidence.alive:
        for role, version in (("champion", status.champion), ("fallback", ledger.fallback)):
            if version not in replica.resident:
                return f"{replica.replica_id} does not hold the {role}, v{version}: nothing to roll back to"
    return None
