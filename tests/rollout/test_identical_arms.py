"""Whole rollouts of a canary that is the champion: all guards, three classes, a look after every few requests."""

from __future__ import annotations

import numpy as np

from engine.contracts import CANARY, CONTROL, RolloutState
from engine.rollout import specs
from engine.store import histogram
from engine.store.repositories.evidence import Segment
from tests.rollout.world import World

CLASSES = ("chat", "code", "batch")
LEVEL = {"chat": 0.3, "code": 0.6, "batch": 0.45}
LOOKS, PER_LOOK = 40, 5


class Arm:
    """Requests of one arm, summed as the evidence query sums them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[tuple[str, float, float, float, bool]] = []  # class, committed, steps, tpot, failed

    def serve(self, rng: np.random.Generator, requests: int, shift: float, errors: float) -> None:
        for _ in range(requests):
            traffic_class = CLASSES[rng.integers(len(CLASSES))]
            steps = float(rng.integers(10, 60))
            own = np.clip(rng.beta(5, 5) - 0.5 + LEVEL[traffic_class] + shift, 0, 1)
            committed = steps + rng.binomial(int(2 * steps), own)
            tpot = 0.03 * steps / committed * rng.lognormal(0, 0.3)
            self.rows.append((traffic_class, committed, steps, tpot, bool(rng.random() < errors)))

    def segments(self, stage_from: int) -> list[Segment]:
        return [self._segment(name, stage_from) for name in (None, *CLASSES)]

    def _segment(self, name: str | None, stage_from: int) -> Segment:
        mine = [row for row in self.rows if name in (None, row[0])]
        x, y = (np.array([row[i] for row in mine], float) for i in (1, 2))
        failed, n = sum(row[4] for row in mine), len(mine)
        return Segment(
            self.name,
            name,
            n,
            len(self.rows) - stage_from,
            n,
            failed,
            n=n,
            x=x.sum(),
            y=y.sum(),
            xx=(x * x).sum(),
            yy=(y * y).sum(),
            xy=(x * y).sum(),
            latencies={"tpot": histogram.count(row[3] for row in mine)},
        )


def rollout(seed: int, shift: float = 0.0, errors: float = 0.01, preset: str = "fast") -> tuple[RolloutState, int]:
    """How it ended, or stands after all looks, and after how many requests per arm."""
    rng = np.random.default_rng(seed)
    world = World(specs.preset(preset))
    world.tick()
    arms, stage_from, stages = (Arm(CANARY), Arm(CONTROL)), 0, 1
    for look in range(LOOKS):
        arms[0].serve(rng, PER_LOOK, shift, errors)
        arms[1].serve(rng, PER_LOOK, 0.0, 0.01)
        world.traffic(*(s for arm in arms for s in arm.segments(stage_from)))
        state = world.tick(5).to_state
        if len(world.status.stages) > stages:
            stages, stage_from = len(world.status.stages), len(arms[0].rows)
        if state in (RolloutState.ROLLING_BACK, RolloutState.PROMOTING):
            return state, (look + 1) * PER_LOOK
    return world.status.state, LOOKS * PER_LOOK


def test_identical_arms_are_not_rolled_back() -> None:
    ends = [rollout(seed)[0] for seed in range(60)]
    assert ends.count(RolloutState.ROLLING_BACK) <= 1  # of 60 at a budget of 1 %: two or more have odds of 12 %


def test_a_canary_whose_drafts_are_garbage_is_found_at_once() -> None:
    found = [rollout(seed, shift=-1.0) for seed in range(10)]
    assert {state for state, _ in found} == {RolloutState.ROLLING_BACK}
    assert np.median([requests for _, requests in found]) <= 30


def test_a_canary_that_is_a_fifth_better_is_promoted_in_minutes() -> None:
    found = [rollout(seed, shift=0.2) for seed in range(10)]
    assert [state for state, _ in found].count(RolloutState.PROMOTING) >= 9
    assert np.median([requests for _, requests in found]) <= 100
