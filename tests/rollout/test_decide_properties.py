"""A hypothesis machine of ten thousand steps: whatever the world does, the invariants of a rollout hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from engine.contracts import TERMINAL_STATES, RolloutState, Verdict
from engine.rollout import decide as decide_module
from engine.rollout import specs
from engine.rollout.records import Action, RolloutStatus
from tests.rollout.world import CANARY_VERSION, CHAMPION, START, World, classes, segment

PROGRESS = {RolloutState.RAMPING: 0, RolloutState.SOAKING: 1, RolloutState.PROMOTING: 2, RolloutState.PROMOTED: 3}


MACHINES, STEPS = 260, 50
ticks: Counter[RolloutState] = Counter()


class Machine(RuleBasedStateMachine):
    """A rollout among people, replicas and traffic that do what they like; checked after every tick."""

    @initialize(
        preset=st.sampled_from(["fast", "standard"]),
        quality=st.sampled_from([1.0, 2.0, 2.6]),
        there=st.integers(0, 3),
        thinks_again=st.integers(0, 14),
    )
    def begin(self, preset: str, quality: float, there: int, thinks_again: int) -> None:
        self.world, self.quality, self.requests = World(specs.preset(preset)), quality, 0
        self.world.replicas = self.world.replicas if there else ()
        self.rng = np.random.default_rng(0)
        if thinks_again == 0:
            self.world.ask("abort")
        self.tick(1)

    @rule(seconds=st.sampled_from([1, 5, 30, 200]), again=st.integers(0, 3))
    def tick(self, seconds: float, again: int = 0) -> None:
        for _ in range(1 + again):
            before, ledger = self.world.status, self.world.ledger
            answered = [c.id for c in self.world.pending()]
            decision = self.world.tick(seconds)
            ticks[decision.to_state] += 1
            check(self.world, before, decision, ledger.generation, answered)

    @rule(verb=st.sampled_from(["hold", "resume", "resume", "promote", "promote"]))
    def somebody_asks(self, verb: str) -> None:
        self.world.ask(verb)
        self.tick(1)

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
        ),
    )


def check(world: World, before: RolloutStatus, decision, generation: int, pending: list[int]) -> None:  # type: ignore[no-untyped-def]
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
        assert decision.verdict is Verdict.FAIL or by_person or decision.status.ends_as is RolloutState.INCONCLUSIVE
    if before.serves and decision.action in (Action.SET_WEIGHT, Action.PROMOTE):
        assert decision.verdict is Verdict.PASS
    if after in PROGRESS and before.state in PROGRESS and PROGRESS[after] > PROGRESS[before.state]:
        assert decision.verdict is Verdict.PASS
    if decision.verdict is Verdict.FAIL and before.state not in TERMINAL_STATES | {RolloutState.ROLLING_BACK}:
        assert decision.action is Action.ROLL_BACK or after is RolloutState.ROLLING_BACK
    if decision.action is not Action.NONE:
        assert world.ledger.generation == generation + 1
    if decision.command_id is not None:
        assert decision.command_id == pending[0]
    started = world.status.stages[0].began if world.status.stages else None
    waiting = {RolloutState.RAMPING, RolloutState.HELD, RolloutState.SOAKING}
    if started and after in waiting and decision.action is Action.NONE:
        assert world.now - started <= timedelta(seconds=world.spec.deadline_s)
    weights = [stage.weight for stage in world.status.stages]
    assert weights == sorted(set(weights))
    assert world.now >= START


def test_the_invariants_hold_in_any_order_of_events() -> None:
    ticks.clear()
    explore(MACHINES)
    assert sum(ticks.values()) >= 10_000
    wanted = set(RolloutState) - {RolloutState.DRAFT, RolloutState.SHADOW}
    assert wanted <= set(ticks), wanted - set(ticks)


@pytest.mark.parametrize("fault", ["ignores failures", "promotes the unproven", "forgets the champion"])
def test_the_invariants_catch_planted_faults(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    right = decide_module.judge

    def wrong_judge(*args, **kwargs):  # type: ignore[no-untyped-def]
        verdict, why = right(*args, **kwargs)
        if fault == "ignores failures" and verdict is Verdict.FAIL:
            return Verdict.INSUFFICIENT, why
        if fault == "promotes the unproven" and verdict in (Verdict.INSUFFICIENT, Verdict.STALE):
            return Verdict.PASS, why
        return verdict, why

    monkeypatch.setattr(decide_module, "judge", wrong_judge)
    if fault == "forgets the champion":
        original = World._append

        def forgetful(self: World, decision) -> None:  # type: ignore[no-untyped-def]
            original(self, decision)
            if decision.action is Action.ROLL_BACK:
                self.ledger = replace(self.ledger, champion=1)

        monkeypatch.setattr(World, "_append", forgetful)
        with pytest.raises(AssertionError):
            explore(60)
        return
    bad = [bad_canary(seed) for seed in range(10)]
    empty = [no_traffic(seed) for seed in range(10)]
    assert any(state is not RolloutState.ROLLED_BACK for state in bad) or RolloutState.INCONCLUSIVE not in empty


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
