"""A world in memory for ``decide``: a ledger, replicas, traffic, people, and a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import numpy as np

from engine.contracts import CANARY, CONTROL, RolloutState
from engine.rollout import specs
from engine.rollout.decide import decide
from engine.rollout.guards import RolloutSpec
from engine.rollout.records import Action, Decision, Evidence, Ledger, Replica, RolloutStatus, with_plan
from engine.store import histogram
from engine.store.repositories.commands import Command
from engine.store.segments import Segment

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
FALLBACK, CHAMPION, CANARY_VERSION = 1, 2, 3


def segment(
    arm: str,
    requests: int,
    tokens_per_step: float = 2.0,
    traffic_class: str | None = None,
    stage_requests: int | None = None,
    errors: int = 0,
    p95: float = 1.0,
    steps: int = 30,
    noise: float = 0.2,
) -> Segment:
    """An arm whose requests take ``steps`` steps each, with ``noise`` as the deviation of a request's own ratio."""
    n = float(requests)
    x, y = n * steps * tokens_per_step, n * steps
    xx = n * (steps * steps) * (tokens_per_step**2 + noise**2)
    usual = round(0.9 * requests)  # nine in ten take half of the p95
    slow = {"e2e": p95, "ttft": p95 / 2, "tpot": p95 / 20}
    return Segment(
        arm,
        traffic_class,
        requests,
        requests if stage_requests is None else stage_requests,
        requests,
        errors,
        n=requests,
        x=x,
        y=y,
        xx=xx,
        yy=n * steps * steps,
        xy=steps * x,
        latencies={
            metric: ([histogram.bucket(top / 2), histogram.bucket(top)], [usual, requests - usual])
            for metric, top in slow.items()
        },
    )


@dataclass
class World:
    """``tick`` decides once and applies the decision, as the controller does."""

    spec: RolloutSpec = field(default_factory=lambda: specs.preset("fast"))
    now: datetime = START
    ledger: Ledger = field(default_factory=lambda: Ledger(10, CHAMPION, FALLBACK, None, None, "engine", "first start"))
    replicas: tuple[Replica, ...] = (Replica("replica-0", 10, (FALLBACK, CHAMPION)),)
    segments: tuple[Segment, ...] = ()
    newest_trace: datetime | None = None
    newest_canary: datetime | None = None
    fault: str | None = None
    commands: list[Command] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seen = self.segments  # what the last decision was made of
        self.status = RolloutStatus(7, CANARY_VERSION, CHAMPION, RolloutState.READY, self.now, asked_at=self.now)

    def tick(self, seconds: float = 1.0) -> Decision:
        self.now += timedelta(seconds=seconds)
        self.seen = self.segments
        decision = decide(self.spec, self.status, self.evidence(), self.pending(), self.now)
        self.decisions.append(decision)
        self.status = decision.status
        if decision.action is not Action.NONE:
            self._append(decision)
        return decision

    def evidence(self) -> Evidence:
        found = Evidence(self.ledger, self.replicas, self.segments, self.newest_trace, fault=self.fault)
        return replace(found, newest_canary=self.newest_canary)

    @property
    def heard(self) -> datetime:
        """When the canary was seen last."""
        return self.newest_canary or START

    def pending(self) -> list[Command]:
        return [command for command in self.commands if command.id > self.status.last_command]

    def ask(self, verb: str, reason: str = "because") -> None:
        self.commands.append(Command(len(self.commands) + 1, 7, verb, "ann", reason, self.now))

    def traffic(self, *segments: Segment) -> None:
        self.segments, self.newest_trace, self.newest_canary = segments, self.now, self.now

    def given(self) -> None:
        """Every replica gives the canary a request of which no trace has come yet."""
        self.replicas = tuple(replace(r, canary_at=self.now) for r in self.replicas)

    def both(self, requests: int, canary: float = 2.0, control: float = 2.0, **extra: int) -> None:
        """All traffic in one class, ``requests`` per arm in this stage."""
        self.traffic(
            *(segment(arm, requests, value, name, **extra)  # type: ignore[arg-type]
              for arm, value in ((CANARY, canary), (CONTROL, control)) for name in (None, "chat"))
        )  # fmt: skip

    def observe(self) -> None:
        """Every replica routes by the newest plan."""
        self.replicas = tuple(
            replace(r, observed_generation=self.ledger.generation, resident=(1, 2, 3)) for r in self.replicas
        )

    def outsider(self, champion: int = CHAMPION, reason: str = "looks wrong") -> None:
        """Somebody takes the canary back, straight in the ledger."""
        self.ledger = Ledger(self.ledger.generation + 1, champion, FALLBACK, None, 7, "bob", reason)
        self.observe()

    def _append(self, decision: Decision) -> None:
        serving = decision.action in (Action.SET_WEIGHT, Action.SHADOW)
        self.ledger = Ledger(
            self.ledger.generation + 1,
            CANARY_VERSION if decision.action in (Action.PROMOTE, Action.SETTLE) else self.status.champion,
            FALLBACK,
            CANARY_VERSION if serving else None,
            7,
            "rollout 7",
            decision.reason,
        )
        self.status = with_plan(decision, self.ledger.generation, self.now)
        self.observe()
        if serving:  # a new stage has no request of its own yet
            self.segments = tuple(replace(s, stage_requests=0) for s in self.segments)


def ramping(spec: RolloutSpec | None = None) -> World:
    """A world whose canary has just been put before traffic."""
    world = World(spec or specs.preset("fast"))
    assert world.tick().to_state is RolloutState.RAMPING
    return world


def classes(rng: np.random.Generator, names: Sequence[str], canary: float, control: float, n: int) -> list[Segment]:
    """Both arms, the sum over ``names`` first, then each of them."""
    found = []
    for arm, level in ((CANARY, canary), (CONTROL, control)):
        parts = [segment(arm, n, max(1.0, level + rng.normal(0, 0.02)), name) for name in names]
        blend = segment(arm, n * len(parts), sum(p.x for p in parts) / max(1.0, sum(p.y for p in parts)))
        found += [blend, *parts]
    return found
