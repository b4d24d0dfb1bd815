"""Canaries that are at fault, tried under load one after the other: does a guard take each back, and who is hurt?

Everything is real but the fault: Postgres, an engine process (``planted`` is its entry point), the controller process,
HTTP clients. Nobody asks for a rollback; what ends a canary is its guards.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from engine.bench import planted
from engine.bench.planted import Fault
from engine.bench.report import Figure, Report, count_figure
from engine.bench.rig import Rig, rig, wait_until
from engine.contracts import TERMINAL_STATES, RolloutState, SlipstreamError, Verdict
from engine.demo import prompts
from engine.demo.traffic import Traffic, served_model
from engine.ops import system
from engine.ops.supervisor import Component, Say
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import publish
from engine.rollout.launch import launch
from engine.settings import Settings
from engine.store.database import ReadSession
from engine.store.repositories import audit, rollouts
from engine.store.repositories.rollouts import DecisionRecord, Rollout

CLIENTS = 8
TOKENS = 12
AFTERWARDS = 40
"""Requests served after each rollback: none of them may be the canary's."""
PATIENCE_S = 240.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the rollout of one fault ended, and what its version served by the traces."""

    fault: Fault
    rollout: Rollout
    decisions: Sequence[DecisionRecord]
    served: audit.Tried

    @property
    def judged(self) -> DecisionRecord | None:
        """The decision that took the canary back: by a guard, and asked for by nobody."""
        return next((d for d in self.decisions if d.verdict is Verdict.FAIL and d.command_id is None), None)


def run(settings: Settings, faults: Sequence[str], seed: int, say: Say) -> Report:
    chosen = [_fault(name) for name in faults] or list(Fault)
    with rig(settings, say, engine=_planted_engine) as own:
        own.supervisor.start(system.controller_component(own.settings))
        traffic = Traffic(own.url, served_model(own.url), prompts.shipped(), CLIENTS, seed, max_tokens=TOKENS)
        traffic.start()
        try:
            rolled = [(fault, _try(own, fault, traffic, say)) for fault in chosen]
        finally:
            traffic.stop()
        wait_until(lambda: own.stored() >= traffic.sent, "all traces in the table", 60.0, pause_s=0.2)
        with own.database.read() as session:
            outcomes = [outcome(session, fault, rollout_id) for fault, rollout_id in rolled]
            figures = [figure for one in outcomes for figure in of_fault(one)]
            figures.append(beyond(session, traffic.failed, traffic.sent))
        return Report("faults", seed, figures, [said(one) for one in outcomes])


def outcome(session: ReadSession, fault: Fault, rollout_id: int) -> Outcome:
    """What became of a rollout; its traces must be there."""
    rollout = rollouts.get(session, rollout_id)
    assert rollout is not None
    decisions = rollouts.decisions(session, rollout_id)
    back = next((d.generation for d in decisions if d.action == "roll_back" and d.generation is not None), None)
    return Outcome(fault, rollout, decisions, audit.tried(session, rollout.canary, since=back or sys.maxsize))


def of_fault(one: Outcome) -> list[Figure]:
    """Where no guard took the canary back there are no times to tell."""
    judged, served, name = one.judged, one.served, one.fault.value
    back = int(judged is not None and one.rollout.state is RolloutState.ROLLED_BACK)
    figures = [
        count_figure(f"rolled_back:{name}", back, 1, "rollouts"),
        count_figure(f"failed_drafts:{name}", served.failed_drafts, served.requests, "requests"),
        count_figure(f"canary_after_rollback:{name}", served.since, served.requests, "requests"),
    ]
    began = next((d.decided_at for d in one.decisions if d.action == "set_weight"), None)
    if judged is None or began is None or served.first_ended is None or served.last_began is None:
        return figures
    figures.append(_one(f"canary_requests:{name}", served.requests, "requests"))
    figures.append(_one(f"decided_after:{name}", _seconds(began, judged.decided_at), "s"))
    figures.append(_one(f"evidence_to_last_canary:{name}", _seconds(served.first_ended, served.last_began), "s"))
    figures.append(_one(f"decision_to_last_canary:{name}", _seconds(judged.decided_at, served.last_began), "s"))
    return figures


def beyond(session: ReadSession, failed: int, sent: int) -> Figure:
    """Requests that failed, by their client or by their trace, though no fault was planted in them."""
    injected = audit.not_ok_saying(session, planted.SAYS)
    return count_figure("failed_beyond_injected", max(failed, audit.not_ok(session)) - injected, sent, "requests")


def said(one: Outcome) -> str:
    """The guard that failed, the class that it named, and why."""
    if one.judged is None:
        return f"{one.fault.value}: {one.rollout.state.value}, {one.rollout.status.get('reason')}"
    failed = [g for g in one.judged.evidence.get("guards", []) if g["verdict"] == Verdict.FAIL.value]
    named = ", ".join(f"{g['guard']} in {g['segment']}" for g in failed)
    return f"{one.fault.value}: {one.rollout.state.value} by {named}: {one.judged.reason}"


def _fault(name: str) -> Fault:
    try:
        return Fault(name)
    except ValueError:
        raise SlipstreamError(f"There is no fault {name!r}; there are {', '.join(Fault)}.") from None


def _planted_engine(settings: Settings) -> Component:
    return replace(system.engine_component(settings), argv=[sys.executable, "-m", "engine.bench.planted"])


def _try(own: Rig, fault: Fault, traffic: Traffic, say: Say) -> int:
    """Roll a version with this fault out and wait until that is over; the rollout's id."""
    store = ArtifactStore(own.settings.dir("policies"))
    version = publish(own.database, store, planted.files(fault), note=f"planted: {fault}").version
    answered = traffic.sent
    wait_until(lambda: traffic.sent >= answered + CLIENTS, "requests before the canary", 60.0, pause_s=0.1)
    made = launch(own.database, canary=version, preset="fast", name=str(fault), actor="bench")
    say(f"{fault}: v{version} is tried")
    wait_until(lambda: _state(own, made.id) in TERMINAL_STATES, f"the end of the rollout of {fault}", PATIENCE_S, 0.1)
    say(f"{fault}: {_state(own, made.id)}")
    sent = traffic.sent
    wait_until(lambda: traffic.sent >= sent + AFTERWARDS, "requests after the rollback", 120.0, pause_s=0.1)
    with own.database.read() as session:
        so_far = outcome(session, fault, made.id)
    say("\n".join([said(so_far), *(f"  {f.name} {f.value:g} {f.unit}" for f in of_fault(so_far))]))
    return made.id


def _state(own: Rig, rollout_id: int) -> RolloutState:
    with own.database.read() as session:
        found = rollouts.get(session, rollout_id)
    assert found is not None
    return found.state


def _seconds(since: datetime, until: datetime) -> float:
    return (until - since).total_seconds()


def _one(name: str, value: float, unit: str) -> Figure:
    """A figure of a single try: it has no interval."""
    return Figure(name, float(value), float(value), float(value), 1, unit)
