"""What a decision is made of, as frozen records that go to JSON and come back the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from enum import StrEnum
from math import isfinite
from typing import Any

from engine.contracts import RolloutState, Verdict
from engine.store.repositories.commands import Command
from engine.store.segments import Segment


class Action(StrEnum):
    """What a decision does to the ledger; everything but NONE appends one plan.

    PROMOTE keeps the champion before as a control beside the new one, SETTLE ends that.
    """

    NONE = "none"
    SHADOW = "shadow"
    SET_WEIGHT = "set_weight"
    PROMOTE = "promote"
    ROLL_BACK = "roll_back"
    SETTLE = "settle"


GIVEN_BACK = frozenset({RolloutState.ROLLING_BACK, RolloutState.ROLLED_BACK, RolloutState.INCONCLUSIVE})
"""States in which the champion has all of the traffic again, or is about to."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One weight that served: its ledger generation and when that was appended."""

    weight: float
    generation: int
    began: datetime


@dataclass(frozen=True, slots=True)
class RolloutStatus:
    """Where a rollout stands. ``champion`` is the rollback target, recorded at creation and never replaced.

    ``generation`` is the last plan this rollout made, ``since`` when the present state began. ``held_by`` is operator
    (until resumed) or evidence (until the evidence is fit again), ``resumes_to`` the state before the hold, ``ends_as``
    what it will be called once its traffic is seen to be back (DONE: proved on its slice). ``restarts`` holds when a
    replica started after a crash meanwhile; ``blind_since`` is the first tick of those in a row in which nobody saw
    what the canary does; ``shadow`` is the plan in which the canary drafted and served nobody, ``watch`` the stage
    after the promotion, in which the champion before is the control. ``asked_at`` is when somebody asked for its start:
    a hold before traffic does not begin its patience anew.
    """

    rollout_id: int
    canary: int
    champion: int
    state: RolloutState
    since: datetime
    stages: tuple[Stage, ...] = ()
    generation: int | None = None
    held_by: str = ""
    resumes_to: RolloutState | None = None
    last_command: int = 0
    verdict: Verdict = Verdict.INSUFFICIENT
    reason: str = ""
    ends_as: RolloutState = RolloutState.ROLLED_BACK
    restarts: tuple[datetime, ...] = ()
    blind_since: datetime | None = None
    watch: Stage | None = None
    shadow: Stage | None = None
    asked_at: datetime | None = None

    @property
    def stage(self) -> Stage:
        return self.stages[-1]

    @property
    def present(self) -> Stage:
        """The stage that serves now: the last weight, or what came after the promotion."""
        return self.watch or self.stage

    @property
    def serves(self) -> bool:
        """Whether this rollout has put its canary before traffic."""
        return bool(self.stages)

    @property
    def in_shadow(self) -> bool:
        """Whether the canary drafts on copies and has not served yet."""
        return self.shadow is not None and not self.stages

    def moved(self, state: RolloutState, now: datetime) -> RolloutStatus:
        return self if state is self.state else replace(self, state=state, since=now)


@dataclass(frozen=True, slots=True)
class Ledger:
    """The newest serving plan, as far as a rollout is concerned. ``canary`` may be one in shadow."""

    generation: int
    champion: int
    fallback: int
    canary: int | None
    rollout_id: int | None
    actor: str
    reason: str


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica that may serve a canary: alive, or silent for less than its lease.

    ``load_error`` is what of the newest plan it could not load, ``after_crash`` whether the one of its name before it
    ended without saying so. ``canary_at`` is when it gave the canary of the present stage a request for the last time.
    """

    replica_id: str
    observed_generation: int | None
    resident: tuple[int, ...]
    load_error: str | None = None
    alive: bool = True
    started_at: datetime | None = None
    after_crash: bool = False
    canary_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything a tick saw. ``observed`` is the canary's share of the eligible requests of this stage.

    ``newest_trace`` is when the last trace of either compared arm in this stage was written, ``newest_canary`` the same
    of the canary alone.
    ``fault`` is why the traffic could not be measured; commands and the deadline count all the same.
    """

    ledger: Ledger | None
    replicas: tuple[Replica, ...] = ()
    segments: tuple[Segment, ...] = ()
    newest_trace: datetime | None = None
    observed: float | None = None
    canary_known: bool = True
    fault: str | None = None
    newest_canary: datetime | None = None

    @property
    def alive(self) -> tuple[Replica, ...]:
        return tuple(replica for replica in self.replicas if replica.alive)


@dataclass(frozen=True, slots=True)
class GuardResult:
    """One line of the guard table. Values are of the named segment; ``log_e`` and ``limit`` are natural logarithms.

    ``low`` and ``high`` bound canary − control of tokens per step, and canary / control − 1 of a latency. ``worst``
    names the class with the most evidence against the canary, ``lean`` is log E of the segment with the most.
    """

    guard: str
    verdict: Verdict
    reason: str
    segment: str = "all"
    n_canary: int = 0
    n_control: int = 0
    canary: float | None = None
    control: float | None = None
    low: float | None = None
    high: float | None = None
    log_e: float | None = None
    limit: float | None = None
    worst: str = ""
    lean: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of one tick. ``status`` is what follows; ``with_plan`` adds the plan that ``action`` appends."""

    verdict: Verdict
    action: Action
    reason: str
    status: RolloutStatus
    guards: tuple[GuardResult, ...] = ()
    weight: float | None = None
    command_id: int | None = None

    @property
    def to_state(self) -> RolloutState:
        return self.status.state


def with_plan(decision: Decision, generation: int, appended: datetime) -> RolloutStatus:
    """The decided status once its plan is in the ledger."""
    status = replace(decision.status, generation=generation)
    if decision.action is Action.SHADOW:
        return replace(status, shadow=Stage(0.0, generation, appended))
    if decision.action is Action.SET_WEIGHT and decision.weight is not None:
        status = replace(status, stages=(*status.stages, Stage(decision.weight, generation, appended)))
    if decision.action is Action.PROMOTE and decision.weight:
        status = replace(status, watch=Stage(decision.weight, generation, appended))
    return status


def consuming(decision: Decision, command: Command | None) -> Decision:
    """The decision with the command it answers struck off the list."""
    if command is None:
        return decision
    status = replace(decision.status, last_command=command.id)
    return replace(decision, status=status, command_id=command.id)


def weights(status: RolloutStatus, evidence: Evidence) -> dict[str, float | None]:
    """Three different numbers: what the ledger asks for, what every live replica routes by, what traffic shows."""
    if not status.serves:
        return {"desired": 0.0, "acknowledged": 0.0, "observed": None}
    seen = [replica.observed_generation or 0 for replica in evidence.replicas]
    shares = [(stage.generation, stage.weight) for stage in status.stages]
    if status.watch is not None:
        shares.append((status.watch.generation, 1.0 - status.watch.weight))
    if (status.generation or 0) > shares[-1][0]:  # the plan that ended the comparison
        given_back = status.state in GIVEN_BACK or status.ends_as is RolloutState.DONE
        shares.append((status.generation or 0, 0.0 if given_back else 1.0))
    taken = [share for generation, share in shares if seen and generation <= min(seen)]
    acknowledged = taken[-1] if taken else 0.0
    return {"desired": shares[-1][1], "acknowledged": acknowledged, "observed": evidence.observed}


def status_to_json(status: RolloutStatus) -> dict[str, Any]:
    return _plain(asdict(status))


def status_from_json(tree: Mapping[str, Any]) -> RolloutStatus:
    values = dict(tree)
    values["state"] = RolloutState(values["state"])
    values["since"] = datetime.fromisoformat(values["since"])
    values["stages"] = tuple(_stage(stage) for stage in values["stages"])
    values["watch"] = _stage(values["watch"]) if values.get("watch") else None
    values["shadow"] = _stage(values["shadow"]) if values.get("shadow") else None
    values["resumes_to"] = RolloutState(values["resumes_to"]) if values["resumes_to"] else None
    values["verdict"] = Verdict(values["verdict"])
    values["ends_as"] = RolloutState(values.get("ends_as", RolloutState.ROLLED_BACK))
    values["restarts"] = tuple(datetime.fromisoformat(at) for at in values.get("restarts", ()))
    values["blind_since"] = _instant(values.get("blind_since"))
    values["asked_at"] = _instant(values.get("asked_at"))
    return RolloutStatus(**values)


def evidence_to_json(
    evidence: Evidence, commands: tuple[Command, ...], guards: tuple[GuardResult, ...], status: RolloutStatus
) -> dict[str, Any]:
    """What a decision row keeps: the inputs, to replay it, and the guard table and weights, to read it."""
    return _plain(
        {
            "inputs": asdict(evidence),
            "commands": [asdict(command) for command in commands],
            "guards": [asdict(guard) for guard in guards],
            "weights": weights(status, evidence),
        }
    )


def evidence_from_json(tree: Mapping[str, Any]) -> tuple[Evidence, tuple[Command, ...]]:
    inputs = tree["inputs"]
    evidence = Evidence(
        ledger=Ledger(**inputs["ledger"]) if inputs["ledger"] else None,
        replicas=tuple(_replica(tree) for tree in inputs["replicas"]),
        segments=tuple(Segment(**segment) for segment in inputs["segments"]),
        newest_trace=_instant(inputs["newest_trace"]),
        observed=inputs["observed"],
        canary_known=inputs["canary_known"],
        fault=inputs.get("fault"),
        newest_canary=_instant(inputs.get("newest_canary")),
    )
    commands = tuple(Command(**{**c, "created_at": datetime.fromisoformat(c["created_at"])}) for c in tree["commands"])
    return evidence, commands


def _replica(tree: Mapping[str, Any]) -> Replica:
    instants = {name: _instant(tree.get(name)) for name in ("started_at", "canary_at")}
    return Replica(**{**tree, "resident": tuple(tree["resident"]), **instants})


def _stage(tree: Mapping[str, Any]) -> Stage:
    return Stage(tree["weight"], tree["generation"], datetime.fromisoformat(tree["began"]))


def _instant(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _plain(value: Any) -> Any:
    """Instants as ISO texts, tuples as lists, what is not finite as None: JSON without surprises."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not isfinite(value):
        return None
    return value
