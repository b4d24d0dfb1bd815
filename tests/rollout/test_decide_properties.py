"""A hypothesis machine of ten thousand steps: whatever the world does, the invariants of a rollout hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from engine.contracts import TERMINAL_STATES, RolloutState, Verdict
from engine.rollout import decide as decide_module
from engine.rollout import specs
from engine.rollout.decide import decide
from engine.rollout.evaluate import evaluate
from engine.rollout.guards import RolloutSpec, Shadow
from engine.rollout.records import GIVEN_BACK, Action, Decision, Evidence, Replica, RolloutStatus
from tests.rollout import world as world_module
from tests.rollout.world import CANARY_VERSION, CHAMPION, START, World, classes, segment

PROGRESS = {RolloutState.RAMPING: 0, RolloutState.SOAKING: 1, RolloutState.PROMOTING: 2, RolloutState.PROMOTED: 3}


MACHINES, STEPS = 300, 50
ticks: Counter[RolloutState] = Counter()


class Machine(RuleBasedStateMachine):
    """A rollout among people, replicas and traffic that do what they like; checked after every tick."""

    @initialize(
        preset=st.sampled_from(["fast", "fast", "standard", "shadow", "slice"]),
        quality=st.sampled_from([1.0, 2.0, 2.6]),
        there=st.integers(0, 3),
        thinks_again=st.integers(0, 14),
    )
    def begin(self, preset: str, quality: float, there: int, thinks_again: int) -> None:
        kinds = {"shadow": {"shadow": Shadow(60)}, "slice": {"traffic_classes": ("chat",)}}
        spec = specs.preset(preset) if preset not in kinds else replace(specs.preset("fast"), **kinds[preset])
        self.world, self.quality, self.requests = World(spec), quality, 0
        self.unseen_since: datetime | None = None
        self.world.replicas = self.world.replicas if there else ()
        self.rng = np.random.default_rng(0)
        if thinks_again == 0:
            self.world.ask("abort")
        self.tick(1)

    @rule(seconds=st.sampled_from([1, 5, 30, 200]), again=st.integers(0, 3))
    def tick(self, seconds: float, again: int = 0) -> None:
        for _ in range(1 + again):
            before, ledger, replicas = self.world.status, self.world.ledger, self.world.replicas
            answered = [c.id for c in self.world.pending()]
            decision = self.world.tick(seconds)
            ticks[decision.to_state] += 1
            check(self.world, before, decision, ledger.generation, answered)
            self.unguarded(before, decision, replicas)

    def unguarded(self, before: RolloutStatus, decision: Decision, replicas: tuple[Replica, ...]) -> None:
        """A canary that is given requests and not seen must not serve for longer than that may last."""
        world, given = self.world, [r.canary_at for r in replicas if r.canary_at is not None]
        in_traffic = before.serves and before.state not in TERMINAL_STATES | {RolloutState.ROLLING_BACK}
        if not in_traffic or not given or max(given) <= (heard := max(before.present.began, world.heard)):
            self.unseen_since = None
        elif world.now - heard > timedelta(seconds=world.spec.stale_s):
            self.unseen_since = self.unseen_since or world.now
            if world.now - self.unseen_since > timedelta(seconds=world.spec.blind_s):
                assert decision.to_state in GIVEN_BACK

    @rule(verb=st.sampled_from(["hold", "resume", "resume", "promote", "promote"]))
    def somebody_asks(self, verb: str) -> None:
        self.world.ask(verb)
        self.tick(1)

    @rule(first=st.sampled_from(["hold", "resume"]), second=st.sampled_from(["hold", "resume", "promote"]))
    def two_ask_at_once(self, first: str, second: str) -> None:
        self.world.ask(first)
        self.world.ask(second)
        self.tick(1)

    @rule(wrong=st.integers(0, 3))
    def held_for_a_while(self, wrong: int) -> None:
        """With traffic meanwhile, and now and then a canary that begins to fail."""
        if self.world.status.state is not RolloutState.RAMPING:
            return
        self.world.ask("hold")
        self.tick(1)
        self.traffic(60, 1 if wrong == 0 else 3, 0)

    @rule(sure=st.integers(0, 19))
    def somebody_ends_it(self, sure: int) -> None:
        if sure == 0:
            self.world.outsider()
        elif sure == 1:
            self.world.ask("abort")
        self.tick(1)

    @rule(generation=st.integers(8, 14), sure=st.integers(0, 2))
    def a_replica_is_behind(self, generation: int, sure: int) -> None:
        if sure:
            return
        self.world.replicas = tuple(replace(r, observed_generation=generation) for r in self.world.replicas)
        self.tick(5)

    @rule(sure=st.integers(0, 3))
    def every_replica_is_gone(self, sure: int) -> None:
        self.world.replicas = () if sure == 0 else self.world.replicas
        self.tick(30)

    @rule()
    def a_replica_is_there(self) -> None:
        self.world.replicas = World().replicas
        self.world.observe()
        self.tick(5)

    @rule(sure=st.integers(0, 3), more=st.integers(1, 4), silent=st.booleans())
    def the_canary_is_not_seen(self, sure: int, more: int, silent: bool) -> None:
        """It is given requests whose traces do not come; those of its control do, or nobody's."""
        for _ in range(0 if sure else more):
            self.world.given()
            self.world.newest_trace = self.world.newest_trace if silent else self.world.now
            self.tick(30)

    @rule(sure=st.integers(0, 4))
    def a_replica_starts_again(self, sure: int) -> None:
        if sure:
            return
        self.world.replicas = tuple(
            replace(r, started_at=self.world.now, after_crash=True) for r in self.world.replicas
        )
        self.tick(5)

    @rule(more=st.integers(1, 120), fault=st.integers(0, 59), again=st.integers(0, 2))
    def traffic(self, more: int, fault: int, again: int) -> None:
        errors, slow = (30 if fault == 1 else 0), (4.0 if fault == 2 else 1.0)
        self.requests += more
        found = classes(self.rng, ["chat", "code"], self.quality, 2.0, self.requests)
        if slow > 1:
            found = [replace(s, latencies=segment(s.arm, s.requests, p95=slow).latencies) for s in found[:1]] + found[
                1:
            ]
        if errors:
            found = [replace(found[0], error_keys=min(errors, found[0].requests)), *found[1:]]
        self.world.traffic(*found)
        self.tick(5, again)


def explore(machines: int) -> None:
    """Deterministic; without shrinking, which would take minutes where a planted fault is found on purpose."""
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=machines,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        ),
    )


def check(world: World, before: RolloutStatus, decision: Decision, generation: int, pending: list[int]) -> None:
    after = decision.to_state
    assert world.status.champion == CHAMPION
    assert world.status.canary == CANARY_VERSION
    if before.state in TERMINAL_STATES:
        assert after is before.state
        assert decision.action is Action.NONE
    if decision.action is Action.ROLL_BACK:
        assert world.ledger.champion == CHAMPION
        assert world.ledger.canary is None
        by_person = decision.command_id is not None
        proved = decision.verdict is Verdict.PASS and bool(world.spec.limits())
        blamed = decision.verdict is Verdict.FAIL
        assert blamed or by_person or proved or decision.status.ends_as is RolloutState.INCONCLUSIVE
    if world.spec.limits():
        assert world.ledger.champion == CHAMPION
    if before.serves and decision.action in (Action.SET_WEIGHT, Action.PROMOTE):
        assert decision.verdict is Verdict.PASS
    if after in PROGRESS and before.state in PROGRESS and PROGRESS[after] > PROGRESS[before.state]:
        assert decision.verdict is Verdict.PASS
    if before.state not in TERMINAL_STATES | {RolloutState.ROLLING_BACK}:
        taken_back = decision.action is Action.ROLL_BACK or after is RolloutState.ROLLING_BACK
        guilty = any(guard.verdict is Verdict.FAIL for guard in decision.guards)
        if before.state is RolloutState.HELD and before.serves:  # every guard, on every tick, whatever is held
            seen = evaluate(world.spec, world.seen, decision.status.restarts, world.now)
            guilty |= any(guard.verdict is Verdict.FAIL for guard in seen)
        if guilty or decision.verdict is Verdict.FAIL:
            assert taken_back or after is RolloutState.INCONCLUSIVE  # made champion by hand meanwhile
        if decision.verdict is Verdict.FAIL:
            assert guilty
    if before.serves and decision.action is Action.SET_WEIGHT:
        here = [s.stage_requests for s in world.seen if s.traffic_class is None]
        assert len(here) == 2
        assert min(here) >= world.spec.min_requests
        assert world.newest_trace is not None
        assert world.now - world.newest_trace <= timedelta(seconds=world.spec.stale_s)
    if before.state is RolloutState.HELD and before.held_by == "operator" and decision.command_id is None:
        assert after in {
            RolloutState.HELD,
            RolloutState.ROLLING_BACK,
            RolloutState.INCONCLUSIVE,
            RolloutState.CANCELLED,
        }
    if decision.action is not Action.NONE:
        assert world.ledger.generation == generation + 1
    if decision.command_id is not None:
        assert decision.command_id == pending[0]
    shadowed = world.status.shadow.began if world.status.shadow is not None else None
    started = world.status.stages[0].began if world.status.stages else shadowed or START
    waiting = {RolloutState.READY, RolloutState.SHADOW, RolloutState.RAMPING, RolloutState.HELD, RolloutState.SOAKING}
    if after in waiting and decision.action is Action.NONE:
        assert world.now - started <= timedelta(seconds=world.spec.deadline_s)
    assert [stage.weight for stage in world.status.stages] == list(world.spec.steps[: len(world.status.stages)])
    assert world.now >= START


def test_the_invariants_hold_in_any_order_of_events() -> None:
    ticks.clear()
    explore(MACHINES)
    assert sum(ticks.values()) >= 10_000
    wanted = set(RolloutState) - {RolloutState.DRAFT}
    assert wanted <= set(ticks), wanted - set(ticks)


def judging(change: Callable[[Verdict], Verdict]) -> Callable[[pytest.MonkeyPatch], None]:
    right = decide_module.judge

    def wrong(*args: Any, **kwargs: Any) -> tuple[Verdict, str]:
        verdict, why = right(*args, **kwargs)
        return change(verdict), why

    return lambda patch: patch.setattr(decide_module, "judge", wrong)


def deciding(change: Callable[..., Decision]) -> Callable[[pytest.MonkeyPatch], None]:
    """``change`` stands in for ``decide``, with the arguments of ``decide``."""
    return lambda patch: patch.setattr(world_module, "decide", change)


def forgets_the_champion(patch: pytest.MonkeyPatch) -> None:
    right = World._append

    def forgetful(self: World, decision: Decision) -> None:
        right(self, decision)
        if decision.action is Action.ROLL_BACK:
            self.ledger = replace(self.ledger, champion=1)

    patch.setattr(World, "_append", forgetful)


def skips_a_step(spec: RolloutSpec, *rest: Any) -> Decision:
    made = decide(spec, *rest)
    return replace(made, weight=spec.steps[-1]) if made.action is Action.SET_WEIGHT else made


def looks_away_while_held(spec: RolloutSpec, status: RolloutStatus, evidence: Evidence, *rest: Any) -> Decision:
    held = status.state is RolloutState.HELD
    return decide(spec, status, replace(evidence, segments=()) if held else evidence, *rest)


def lets_go_of_what_a_person_holds(spec: RolloutSpec, status: RolloutStatus, *rest: Any) -> Decision:
    return decide(spec, replace(status, held_by="evidence") if status.held_by else status, *rest)


FAULTS = {
    "ignores failures": judging(lambda v: Verdict.INSUFFICIENT if v is Verdict.FAIL else v),
    "promotes the unproven": judging(lambda v: Verdict.PASS if v is Verdict.INSUFFICIENT else v),
    "promotes the unseen": judging(lambda v: Verdict.PASS if v is Verdict.STALE else v),
    "blames the unseen": judging(lambda v: Verdict.FAIL if v is Verdict.STALE else v),
    "wakes the dead": lambda patch: patch.setattr(decide_module, "TERMINAL_STATES", frozenset()),
    "forgets the champion": forgets_the_champion,
    "knows no deadline": deciding(lambda spec, *rest: decide(replace(spec, deadline_s=1e9), *rest)),
    "answers the newest first": deciding(
        lambda spec, status, evidence, commands, now: decide(spec, status, evidence, commands[::-1], now)
    ),
    "skips a step": deciding(skips_a_step),
    "looks away while held": deciding(looks_away_while_held),
    "takes lost traces for no traffic": lambda patch: patch.setattr(
        decide_module, "blindness", lambda spec, status, evidence, now: evidence.fault
    ),
    "lets go of what a person holds": deciding(lets_go_of_what_a_person_holds),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_invariants_catch_planted_faults(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError):
        explore(MACHINES)


def test_a_bad_canary_is_always_rolled_back_and_an_unseen_one_never_promoted() -> None:
    assert {bad_canary(seed) for seed in range(10)} == {RolloutState.ROLLED_BACK}
    assert {no_traffic(seed) for seed in range(10)} == {RolloutState.INCONCLUSIVE}


def bad_canary(seed: int) -> RolloutState:
    rng = np.random.default_rng(seed)
    world = World()
    for i in range(1, 30):
        world.traffic(*classes(rng, ["chat", "code"], 1.2, 2.0, 5 * i))
        world.tick(5)
    return world.status.state


def no_traffic(seed: int) -> RolloutState:
    rng = np.random.default_rng(seed)
    world = World()
    for _ in range(200):
        world.tick(float(rng.integers(1, 60)))
    return world.status.state
