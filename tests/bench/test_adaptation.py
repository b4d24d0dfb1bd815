"""The adaptation benchmark over made-up responses: streams, what learning is charged, what the gate prevents."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from engine.bench.adaptation import figures
from engine.bench.adaptation.arms import AdaptiveArm, Arm, Served, offline
from engine.bench.adaptation.figures import Run
from engine.bench.adaptation.run import prevented
from engine.bench.adaptation.sabotage import sabotaged
from engine.bench.adaptation.streams import STREAMS, Response, stream
from engine.bench.adaptation.world import World
from engine.contracts import SpecCounts
from engine.learner.memory import MemoryLearner
from engine.settings import LearnerSettings
from engine.speculation.ngram import NgramProposer
from engine.speculation.none import NoneProposer
from tests.learner.test_gate import TARGET, traffic


def responses(count: int, seed: int, names: tuple[str, ...] = ("chat", "code")) -> list[Response]:
    made = traffic(np.random.default_rng(seed), count, names)
    return [Response(t.traffic_class, tuple(t.prompt_ids), tuple(t.output_ids)) for t in made]


@pytest.fixture
def world() -> World:
    seconds = iter(range(10**6))
    settings = LearnerSettings(every_requests=16, gate_share=0.5)
    return World(TARGET, settings, 512, 0, cpu=lambda: float(next(seconds)))  # each look is a second later


@pytest.fixture
def classes() -> dict[str, list[Response]]:
    found = responses(120, 1, ("a", "b", "c"))
    return {name: [r for r in found if r.traffic_class == name] for name in ("a", "b", "c")}


@pytest.mark.parametrize("name", STREAMS)
def test_no_prompt_comes_twice_and_a_seed_is_one_order(name: str, classes: dict[str, list[Response]]) -> None:
    one = stream(name, classes, 3)
    assert len({r.prompt_ids for r in one.requests}) == len(one.requests)
    assert one == stream(name, classes, 3) != stream(name, classes, 4)
    assert one.phases[0].first == 0
    assert one.phases[-1].last == len(one.requests)


def test_a_shift_is_one_class_after_the_other_and_recurring_comes_back(classes: dict[str, list[Response]]) -> None:
    shift = stream("shift", classes, 0)
    for phase in shift.phases:
        assert {r.traffic_class for r in shift.requests[phase.first : phase.last]} == {phase.traffic_class}
    names = [phase.traffic_class for phase in stream("recurring", classes, 0).phases]
    assert names[:2] == names[2:]
    assert len(set(names)) == 2


def test_an_arm_that_learns_gets_better_and_pays_for_it(world: World) -> None:
    requests = responses(96, 2)
    arm, frozen = AdaptiveArm("gated", world, NoneProposer(), (), gated=True), Arm("none", world, NoneProposer())
    served, plain = [arm.serve(r) for r in requests], [frozen.serve(r) for r in requests]
    assert arm.version > 1
    assert sum(s.decode_s for s in served[48:]) < sum(s.decode_s for s in plain[48:])
    assert sum(s.learn_s for s in served) == sum(a.learn_s + a.gate_s for a in arm.attempts) > 0
    assert all(s.learn_s == 0 for s in plain)
    run = Run(stream("mixed", {"a": requests}, 0), 0, {"gated": served, "none": plain}, {})
    rng = np.random.default_rng(0)
    charged, free = (
        figures.ratio("r", figures.pairs(run, "gated", "none", range(96), wanted), rng).value
        for wanted in (True, False)
    )
    assert charged < free


def test_what_judges_never_teaches(world: World) -> None:
    arm = AdaptiveArm("gated", world, NoneProposer(), (), gated=True)
    for response in responses(64, 3) * 2:  # every prompt comes again
        arm.serve(response)
    taught = {tuple(t.prompt_ids) for t in arm.traffic.train}
    assert taught
    assert not taught & {tuple(t.prompt_ids) for t in arm.traffic.held_out}


def test_the_gated_arm_refuses_what_the_ungated_one_serves(world: World) -> None:
    """Traffic that teaches nothing: the one without a gate serves every version of it."""
    rng = np.random.default_rng(0)
    noise = [Response("chat", (n,), tuple(rng.integers(0, 10**6, 40).tolist())) for n in range(64)]
    start = NgramProposer(4)
    gated, ungated = (AdaptiveArm("x", world, start, (), gated=wanted) for wanted in (True, False))
    for response in noise:
        gated.serve(response)
        ungated.serve(response)
    assert gated.version == 1
    assert ungated.version > 1
    assert all(not a.reason.startswith("not gated") and a.version is None for a in gated.attempts)


def test_bad_updates_in_the_middle_of_a_stream_are_served_without_a_gate_only(world: World) -> None:
    gated, ungated = (
        AdaptiveArm("x", world, offline(world, responses(6, 6)), (), gated=wanted) for wanted in (True, False)
    )
    requests = responses(160, 5)
    arms = {"gated": gated, "ungated": ungated}
    served = dict[str, list[Served]]()
    for name, arm in arms.items():
        arm.saboteur = partial(sabotaged, rng=np.random.default_rng(0))
        served[name] = [arm.serve(response) for response in requests]
    planted = {name: [a for a in arm.attempts if a.planted] for name, arm in arms.items()}
    assert len({a.planted for a in planted["gated"]}) == 6
    assert all(a.version is None and a.reason for a in planted["gated"])
    assert any(a.version is not None for a in planted["ungated"])
    assert all(not a.learn_s and not a.gate_s for a in planted["gated"])
    run = Run(stream("planted", {"a": requests}, 0), 0, served, {})
    run = replace(run, stream=replace(run.stream, requests=tuple(requests)))
    found = {f.name: f for f in prevented([run], {0: arms}, np.random.default_rng(0))}
    assert found["bad_updates_served"].value == found["worse_versions_served"].value == 0
    assert found["bad_updates_served:ungated"].value > 0
    assert found["worse_versions_served:ungated"].value > 0
    worst = found["worst_class_loss:ungated"]
    assert found["worse_versions_served"].n > 0
    assert worst.value > 0.02 > found["worst_class_loss"].value
    assert worst.low < worst.value < worst.high
    assert worst.n >= 16  # requests

    # A version after which too little comes is not one that lost nothing.
    short = replace(run, stream=replace(run.stream, requests=tuple(requests[:15])))
    none = {f.name: f for f in prevented([short], {0: arms}, np.random.default_rng(0))}
    assert none["worse_versions_served"].n == none["worse_versions_served:ungated"].n == 0
    assert not any(name.startswith("worst_class_loss") for name in none)


def test_offline_training_is_never_taught_what_another_call_was(world: World) -> None:
    """One learner for many policies counts by ordinal; the fault this test was written for gave two calls the same."""
    corpus, a, b = responses(20, 6), responses(20, 7), responses(20, 8)
    shared = MemoryLearner()
    offline(world, corpus, a, shared, after=100)
    again, fresh = offline(world, corpus, b, shared, after=200), offline(world, corpus, b, after=200)
    probe = responses(10, 9)
    assert [Arm("x", world, again).serve(r) for r in probe] == [Arm("x", world, fresh).serve(r) for r in probe]


def test_recovery_counts_from_the_shift(classes: dict[str, list[Response]]) -> None:
    one = stream("shift", classes, 0)
    second = one.phases[1]
    counts = SpecCounts(steps=10, accepted=10)
    good, bad = Served("x", 1, counts, 1.0), Served("x", 1, counts, 2.0)
    served = [bad if at < second.first + 10 else good for at in range(len(one.requests))]
    run = Run(one, 0, {"gated": served}, dict.fromkeys(range(len(one.requests)), good))
    found = figures.recovery([run], "gated", second.traffic_class)
    assert found is not None
    assert 8 <= found.value <= 10  # a window with two bad ones in it still reaches nine tenths
    never = replace(run, arms={"gated": [bad] * len(served)})
    worst = figures.recovery([never], "gated", second.traffic_class)
    assert worst is not None
    assert worst.value == second.last - second.first
