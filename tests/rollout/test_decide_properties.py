"""Thousands of random ticks: whatever the world does, the invariants of a rollout hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from engine.contracts import TERMINAL_STATES, RolloutState, Verdict
from engine.rollout import decide as decide_module
from engine.rollout import specs
from engine.rollout.records import Action, RolloutStatus
from tests.rollout.world import CANARY_VERSION, CHAMPION, START, World, classes

STEPS_PER_WORLD, WORLDS = 40, 100
PROGRESS = {RolloutState.RAMPING: 0, RolloutState.SOAKING: 1, RolloutState.PROMOTING: 2, RolloutState.PROMOTED: 3}


def random_world(seed: int) -> World:
    rng = np.random.default_rng(seed)
    world = World(specs.preset(("fast", "standard")[seed % 2]))
    quality = float(rng.choice([1.0, 2.0, 2.0, 2.4]))
    requests = 0
    for _ in range(STEPS_PER_WORLD):
        before, ledger, answered = world.status, world.ledger, [c.id for c in world.pending()]
        decision = world.tick(float(rng.choice([1, 5, 30, 200])))
        check(world, before, decision, ledger.generation, answered)
        match rng.integers(12):
            case 0:
                world.ask(str(rng.choice(["hold", "resume", "promote"])))
            case 1 if rng.random() < 0.3:
                world.ask("abort")
            case 2 if rng.random() < 0.2:
                world.outsider()
            case 3:
                world.replicas = tuple(replace(r, observed_generation=int(rng.integers(8, 14))) for r in world.replicas)
            case 4 if rng.random() < 0.3:
                world.replicas = ()
            case 5:
                world.replicas = World().replicas
                world.observe()
            case _:
                requests += int(rng.integers(0, 120))
                if requests:
                    world.traffic(*classes(rng, ["chat", "code"], quality, 2.0, requests))
    return world


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
    ends = Counter(random_world(seed).status.state for seed in range(WORLDS))
    assert WORLDS * STEPS_PER_WORLD >= 2_000
    assert {RolloutState.ROLLED_BACK, RolloutState.DONE, RolloutState.INCONCLUSIVE} <= set(ends), ends


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
            [random_world(seed) for seed in range(WORLDS)]
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
