"""A ledger, a replica and a clock around ``decide``: one simulated rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np

from engine.bench.rollout_world import Arm, World, looks
from engine.contracts import TERMINAL_STATES, RolloutState, Verdict
from engine.rollout import specs
from engine.rollout.decide import PROMOTED_STATES, decide
from engine.rollout.guards import RolloutSpec
from engine.rollout.records import Action, Decision, Evidence, GuardResult, Ledger, Replica, RolloutStatus, with_plan
from engine.store.repositories.commands import Command
from engine.store.segments import Segment

START = datetime(2026, 1, 1, tzinfo=UTC)
RATES = {"fast": 2.0, "standard": 10.0, "cautious": 1.0}
"""Requests a second over all arms, by preset: at a weight w each arm gets w of them. They are such that what the preset
waits for fits into the few thousand requests that are simulated."""
FALLBACK, CHAMPION, TRIED = 1, 2, 3
READY = RolloutStatus(1, TRIED, CHAMPION, RolloutState.READY, START)


class Simulation:
    """One rollout of a preset in a world, looked at after so many requests per arm; a shadow has requests of its own.

    ``status`` is where it begins; ``evidence`` and ``decision`` are those of the last tick.
    """

    def __init__(
        self,
        world: World,
        seed: int,
        at: np.ndarray,
        begins: int = 0,
        status: RolloutStatus = READY,
        preset: str = "standard",
    ) -> None:
        self.spec: RolloutSpec = specs.preset(preset)
        self.rate, self.failed_in_shadow = RATES[preset], None  # type: float, GuardResult | None
        self.arms, self.looks = world.arms(seed, at, begins, self.spec.metrics()), at
        self.status, self.start = status, status.since
        self.ledger = Ledger(1, status.champion, FALLBACK, None, None, "server", "first start")
        self.now, self.times = self.start, dict[int, datetime]()
        self.stage_look: int | None = None
        self.watch_look: int | None = None
        self.tick((), ())
        if self.spec.shadow is not None:
            self._shadow(world.arms([seed, 1], looks(self.spec.shadow.requests)))

    def _shadow(self, arms: tuple[Arm, Arm]) -> None:
        """Both arms draft on requests of their own, which is harder than on the same. A FAIL there ends it all."""
        for look in range(len(arms[0].sums)):
            self.now += timedelta(seconds=1)
            decision = self.tick([s for arm in arms for s in arm.segments(look, None)], ())
            self.failed_in_shadow = _failed(decision)
            if decision.to_state is not RolloutState.SHADOW:
                return

    def tick(self, segments: Sequence[Segment], commands: Sequence[Command], heard: bool = True) -> Decision:
        tried, before, number = self.status.canary, self.status.champion, self.status.rollout_id
        replica = Replica("r0", self.ledger.generation, (FALLBACK, before, tried))
        self.evidence = Evidence(self.ledger, (replica,), tuple(segments), self.now if heard else None)
        self.decision = decision = decide(self.spec, self.status, self.evidence, commands, self.now)
        self.status = decision.status
        if decision.action is not Action.NONE:
            promoted = decision.to_state in PROMOTED_STATES
            serving = decision.action in (Action.SET_WEIGHT, Action.SHADOW)
            champion, canary = tried if promoted else before, tried if serving or promoted else None
            actor = f"rollout {number}"
            self.ledger = Ledger(self.ledger.generation + 1, champion, FALLBACK, canary, number, actor, "")
            self.status = with_plan(decision, self.ledger.generation, self.now)
        return decision

    def step(self, look: int, commands: Sequence[Command] = ()) -> Decision:
        """The next requests come at the rate of the present weight; what is warming up does not count."""
        stage = self.status.present
        before = int(self.looks[look - 1]) if look else 0
        self.now += timedelta(seconds=(int(self.looks[look]) - before) / (self.rate * stage.weight))
        if self.now - stage.began < timedelta(seconds=self.spec.warmup_s):
            self.now = stage.began + timedelta(seconds=self.spec.warmup_s)
        self.times[int(self.looks[look])] = self.now
        decision = self.tick(self.seen(look), commands)
        if decision.action is Action.SET_WEIGHT:
            self.stage_look = look
        if decision.action is Action.PROMOTE:
            self.watch_look = look
        return decision

    def seen(self, look: int) -> list[Segment]:
        return [s for arm in self.arms for s in arm.segments(look, self.stage_look, self.watch_look)]

    def seconds_since(self, begins: int) -> float:
        """Since the regression began, or the first canary traffic."""
        return (self.now - self.times.get(begins, self.start)).total_seconds()

    def reaches(self, state: str) -> int | None:
        """The look at which a state is reached, None if never; what a person asks for comes at a tenth of the looks."""
        if state == "held":
            return len(self.looks) // 10
        for look in range(len(self.looks)):
            if self.step(look).to_state.value.lower() == state:
                return look
        return None

    def end(self, hold: bool = False) -> tuple[str, int, GuardResult | None]:
        """(how it ended, at which look, the guard that failed). Promoted is what stays champion to the end."""
        if self.failed_in_shadow is not None:
            return "rolled_back", 0, self.failed_in_shadow
        for look in range(len(self.looks)):
            asked = (Command(1, 1, "hold", "bench", "held", self.now),) if hold and look == 2 else ()
            decision = self.step(look, asked)
            if decision.verdict is Verdict.FAIL:
                return "rolled_back", look, _failed(decision)
            if decision.to_state in TERMINAL_STATES:
                return "promoted" if decision.to_state is RolloutState.DONE else "undecided", look, None
        return "undecided", len(self.looks) - 1, None


def _failed(decision: Decision) -> GuardResult | None:
    return next((g for g in decision.guards if g.verdict is Verdict.FAIL), None)


def no_traffic() -> tuple[str, bool]:
    """0 requests a second until the deadline: (how it ends, whether the first hour promoted or blamed it)."""
    alone = Simulation(World("none"), 0, looks(10))
    alone.spec = replace(alone.spec, deadline_s=3_600.0)
    wrong, began = False, alone.now
    while alone.status.state not in TERMINAL_STATES:
        alone.now += timedelta(seconds=30)
        decision = alone.tick((), (), heard=False)
        wrong |= decision.verdict in (Verdict.FAIL, Verdict.PASS)
        early = alone.now - began <= timedelta(seconds=alone.spec.deadline_s)
        wrong |= early and decision.to_state not in (RolloutState.RAMPING, RolloutState.HELD)
    return alone.status.state.value, wrong
