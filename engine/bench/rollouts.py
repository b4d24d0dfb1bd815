"""`slipstream bench rollouts`: whole rollouts in simulated worlds, decided by the real ``decide``.

Each world runs many rollouts of the ``standard`` preset, with a look at every few requests until it rolls back,
promotes or runs out of requests. Beside it, on the same traffic, two rules that people write by hand: a threshold on
windows, and a significance test that is looked at all the time.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial

import numpy as np

from engine.bench.report import Figure, Report, quantile_figure, share_figure
from engine.bench.rollout_world import Arm, Regression, Traffic, World, looks
from engine.contracts import RolloutState, Verdict
from engine.rollout import specs, statistics
from engine.rollout.decide import decide
from engine.rollout.guards import RolloutSpec
from engine.rollout.records import Action, Decision, Evidence, GuardResult, Ledger, Replica, RolloutStatus, with_plan
from engine.rollout.statistics import Moments
from engine.store.repositories.rollouts import Command

START = datetime(2026, 1, 1, tzinfo=UTC)
RATE = 2.0
"""Requests a second and arm, for what is reckoned in seconds."""
FALLBACK, CHAMPION, TRIED = 1, 2, 3
MARGIN = 1.05
WINDOW, STRIKES, TOLERATED = 200, 4, 1.10
"""The naive threshold: the fourth window of 200 requests whose p95 is a tenth higher rolls back."""

EQUAL = [
    World("identical"),
    World("margin", Regression(scale=MARGIN)),
    World("load_shock", traffic=Traffic(shock=3.0)),
    World("diurnal", traffic=Traffic(day=0.5)),
    World("mix_shift", traffic=Traffic(mix=True)),
    World("slow_replica", traffic=Traffic(slow_replica=0.25)),
    World("bad_records", traffic=Traffic(lost=0.05, doubled=0.03, late=20)),
]
WORSE = [
    World("p50_x2", Regression(scale=2.0)),
    World("p95_x1.5", Regression(tail=1.5)),
    World("tail_x5_in_2pct", Regression(slow_share=0.02, timeouts=0.01)),
    World("acceptance_-.05", Regression(acceptance=-0.05)),
    World("errors_2pct", Regression(errors=0.02)),
    World("errors_5pct", Regression(errors=0.05)),
    World("hangs_5pct", Regression(timeouts=0.05)),
]
SEGMENT = World("one_class_of_10pct", Regression(acceptance=-0.10, only="batch"))
LATER = ("held", "soaking")
"""Regressions that begin when a state is reached; acceptance falls by a tenth."""


@dataclass(frozen=True, slots=True)
class Run:
    """How one rollout ended: ``at`` requests per arm, ``segment`` and ``worst`` class named by the guard that failed;
    when the naive rules would have rolled back."""

    ended: str
    at: int
    segment: str
    worst: str
    window: int | None
    peek: int | None


def run(quick: bool, seed: int, progress: Callable[[str], None] = lambda _: None, workers: int | None = None) -> Report:
    """All worlds. ``quick``: 200 rollouts with identical arms and few elsewhere; otherwise 2,000."""
    many, others, found, horizon = (200, 20, 30, 2_000) if quick else (2_000, 200, 200, 3_000)
    figures: list[Figure] = []
    rng = np.random.default_rng(seed)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or min(4, os.cpu_count() or 1), mp_context=context) as pool:

        def runs(world: World, count: int, length: int = horizon, until: str = "") -> list[Run]:
            progress(f"{world.name}{' from ' + until if until else ''}: {count} rollouts of {length} requests per arm")
            task = partial(rollout, world, length, until)
            return list(pool.map(task, range(seed, seed + count), chunksize=5))

        for world in EQUAL:
            figures += _false(world, runs(world, many if world.name == "identical" else others))
        for world in WORSE:
            figures += _detection(world.name, runs(world, found), rng)
        ends = runs(SEGMENT, found, 6_000)
        named = sum(r.ended == "rolled_back" and SEGMENT.wrong.only in (r.segment, r.worst) for r in ends)
        figures += [*_detection(SEGMENT.name, ends, rng)[:2], share_figure("segment_named", named, len(ends))]
        for until in LATER:
            worse = World(f"begins_{until}", Regression(acceptance=-0.10))
            figures += _detection(worse.name, runs(worse, found // 2, horizon, until), rng)
    figures.append(share_figure("ended_by_no_traffic:inconclusive", int(no_traffic() == "INCONCLUSIVE"), 1))
    return Report("rollouts", seed, figures)


def rollout(world: World, horizon: int, until: str, seed: int) -> Run:
    """One rollout. With ``until`` the regression begins when that state is reached, and ``at`` counts from there."""
    at = looks(horizon)
    begins = 0
    if until:
        quiet = _Rollout(replace(world, wrong=Regression()), seed, at)
        begins = int(at[quiet.reaches(until)])
    going = _Rollout(world, seed, at, begins)
    ended, look, failed = going.end(hold=until == "held")
    window, peek = naive_window(going.arms), naive_peek(going.arms, at)
    named = (failed.segment, failed.worst) if failed is not None else ("", "")
    return Run(ended, max(0, int(at[look]) - begins), *named, window, peek)


class _Rollout:
    """A ledger, a replica and a clock around ``decide``."""

    def __init__(self, world: World, seed: int, at: np.ndarray, begins: int = 0) -> None:
        self.arms, self.looks = world.arms(seed, at, begins), at
        self.spec: RolloutSpec = specs.preset("standard")
        self.status = RolloutStatus(1, TRIED, CHAMPION, RolloutState.READY, START)
        self.ledger = Ledger(1, CHAMPION, FALLBACK, None, None, "server", "first start")
        self.now, self.stage_look = START, None  # type: datetime, int | None
        self.tick((), ())

    def tick(self, segments: Sequence[object], commands: Sequence[Command]) -> Decision:
        replica = Replica("r0", self.ledger.generation, (FALLBACK, CHAMPION, TRIED))
        evidence = Evidence(self.ledger, (replica,), tuple(segments), self.now)  # type: ignore[arg-type]
        decision = decide(self.spec, self.status, evidence, commands, self.now)
        self.status = decision.status
        if decision.action is not Action.NONE:
            promoted, serving = decision.action is Action.PROMOTE, decision.action is Action.SET_WEIGHT
            champion, canary = TRIED if promoted else CHAMPION, TRIED if serving else None
            self.ledger = Ledger(self.ledger.generation + 1, champion, FALLBACK, canary, 1, "rollout 1", "")
            self.status = with_plan(decision, self.ledger.generation, self.now)
        return decision

    def step(self, look: int, commands: Sequence[Command] = ()) -> Decision:
        self.now = START + timedelta(seconds=60 + float(self.looks[look]) / RATE)
        segments = [s for arm in self.arms for s in arm.segments(look, self.stage_look)]
        stages = len(self.status.stages)
        decision = self.tick(segments, commands)
        if len(self.status.stages) > stages:
            self.stage_look = look
        return decision

    def reaches(self, state: str) -> int:
        """The look at which a state is reached; one that a person asks for comes at a quarter of the looks."""
        if state == "held":
            return len(self.looks) // 4
        for look in range(len(self.looks)):
            if self.step(look).to_state.value.lower() == state:
                return look
        return len(self.looks) // 2

    def end(self, hold: bool = False) -> tuple[str, int, GuardResult | None]:
        """(how it ended, at which look, the guard that failed)."""
        for look in range(len(self.looks)):
            asked = (Command(1, 1, "hold", "bench", "held", self.now),) if hold and look == 2 else ()
            decision = self.step(look, asked)
            if decision.verdict is Verdict.FAIL:
                failed = next(g for g in decision.guards if g.verdict is Verdict.FAIL)
                return "rolled_back", look, failed
            if decision.to_state is RolloutState.PROMOTING:
                return "promoted", look, None
        return "undecided", len(self.looks) - 1, None


def naive_window(arms: tuple[Arm, Arm]) -> int | None:
    """When the threshold on windows would have rolled back, requests per arm."""
    canary, control = (arm.latency[: len(arm.latency) // WINDOW * WINDOW].reshape(-1, WINDOW) for arm in arms)
    above = np.quantile(canary, 0.95, axis=1) > TOLERATED * np.quantile(control, 0.95, axis=1)
    hits = np.flatnonzero(np.cumsum(above) >= STRIKES)
    return int((hits[0] + 1) * WINDOW) if len(hits) else None


def naive_peek(arms: tuple[Arm, Arm], at: np.ndarray) -> int | None:
    """When a one-sided z-test of tokens per step at 5 %, looked at every time, would have rolled back."""
    canary, control = (Moments(*(arm.sums.sum(1)[:, k] for k in range(6))) for arm in arms)
    diff = statistics.difference(canary, control)
    hits = np.flatnonzero((diff.estimate < -1.645 * diff.se) & (at >= 20))
    return int(at[hits[0]]) if len(hits) else None


def no_traffic() -> str:
    """An hour and more at 0 requests a second: how it ends."""
    alone = _Rollout(World("none"), 0, looks(10))
    while True:
        alone.now += timedelta(seconds=30)
        evidence = Evidence(alone.ledger, (Replica("r0", alone.ledger.generation, (1, 2, 3)),))
        decision = decide(alone.spec, alone.status, evidence, (), alone.now)
        alone.status = decision.status
        if decision.action is not Action.NONE:
            alone.ledger = Ledger(alone.ledger.generation + 1, CHAMPION, FALLBACK, None, 1, "rollout 1", "")
            alone.status = with_plan(decision, alone.ledger.generation, alone.now)
        if decision.to_state not in (RolloutState.RAMPING, RolloutState.HELD, RolloutState.ROLLING_BACK):
            return decision.to_state.value


def _false(world: World, ends: Sequence[Run]) -> list[Figure]:
    figures = [share_figure(f"false_rollback:{world.name}", sum(r.ended == "rolled_back" for r in ends), len(ends))]
    for rule in ("window", "peek"):
        name = f"naive_{rule}" if world.name == "identical" else f"naive_{rule}_{world.name}"
        fired = sum(getattr(r, rule) is not None for r in ends)
        figures.append(share_figure(f"false_rollback:{name}", fired, len(ends)))
    return figures


def _detection(name: str, ends: Sequence[Run], rng: np.random.Generator) -> list[Figure]:
    """A rollout that is not rolled back counts as found after the last request of the longest."""
    longest = max(r.at for r in ends)
    at = [float(r.at if r.ended == "rolled_back" else longest) for r in ends]
    rate = share_figure(f"detected:{name}", sum(r.ended == "rolled_back" for r in ends), len(ends))
    median, p90 = (
        quantile_figure(f"{label}:{name}", at, q, "requests per arm", rng)
        for label, q in (("detect_n", 0.5), ("detect_n_p90", 0.9))
    )
    naive = [
        share_figure(f"detected_naive_{rule}:{name}", sum(getattr(r, rule) is not None for r in ends), len(ends))
        for rule in ("window", "peek")
    ]
    return [rate, median, p90, *naive]
