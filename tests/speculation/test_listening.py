"""Who listens to the target's hidden states: a few where drafting does not pay, all where it does, and in time."""

from __future__ import annotations

import itertools

import pytest

from engine.speculation import control, listening
from engine.speculation.acceptance import Acceptance, ControlSettings
from engine.speculation.control import KController, Offer, RowControl, learn_worth
from engine.speculation.listening import SAMPLED, SETTLED, WARM, Audience
from engine.speculation.step_costs import StepCosts

COSTS = {1: 0.023, 16: 0.070, 64: 0.194}
NEVER = 10**9


class Class:
    """Requests of a neural policy in one class, whose drafts bring what a test says; a pass of the draft takes so long,
    however many are asked."""

    def __init__(self, requests: int, pass_s: float = 1e-5) -> None:
        self.pass_s = pass_s
        self.controller = KController(StepCosts(COSTS))
        self.rows = [self.request() for _ in range(requests)]

    def request(self, beside: int = 0) -> RowControl:
        (row,) = self.controller.rows(1, "chat", ControlSettings(), 1, reads=True)
        self.controller.begin(row, beside + 1)
        return row

    def step(self, rows: list[RowControl], chance: float) -> list[int]:
        limits = self.controller.limits(rows, [4] * len(rows))
        control.learn_costs(rows, [self.pass_s / max(sum(map(bool, limits)), 1)] * len(rows), limits)
        choice = self.controller.choose([Offer(row, n, [chance] * n) for row, n in zip(rows, limits, strict=True)])
        learn_worth([[row] for row in rows], [0] * len(rows), choice, choice.expected, choice.pass_s)
        return limits


def hears(row: RowControl) -> bool:
    assert row.listening is not None
    return row.listening.on


def test_where_drafting_does_not_pay_a_few_listen_and_only_they_are_asked() -> None:
    world = Class(2 * SAMPLED)
    rows = world.rows[SAMPLED - 16 : SAMPLED]
    asked = [world.step(rows, 0.05) for _ in range(400)]
    assert [hears(row) for row in rows] == [False] * 15 + [True]
    late = [sum(map(bool, limits)) for limits in asked[200:]]
    assert max(late) == 1, "the one that listens"
    assert sum(late) in (12, 13), "one step in sixteen"
    more = [world.request(beside=15) for _ in range(2 * SAMPLED)]
    assert sum(hears(row) for row in more) == 2, "nor are prompts listened to"


def test_drafting_is_resumed_where_it_pays_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def share(steps: int) -> float:
        rows = (world := Class(SAMPLED)).rows[-16:]
        for _ in range(400):
            world.step(rows, 0.05)
        for _ in range(steps):
            asked = world.step(rows, 0.95)
        return sum(map(bool, asked)) / len(asked)

    assert share(SETTLED + WARM - 1) < 0.1
    assert share(1_500) == 1
    monkeypatch.setattr(listening, "SAMPLED", NEVER)  # the fault: nobody is left to find out
    assert share(1_500) == 0


def test_what_a_probe_takes_alone_is_not_what_asking_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen share a pass of the draft; the one that listens has it all, which what it saves would not be worth."""

    def resumes() -> bool:
        rows = (world := Class(SAMPLED, pass_s=0.008)).rows[-16:]
        for _ in range(2_000):
            world.step(rows, 0.05)
        for _ in range(1_500):
            asked = world.step(rows, 0.95)
        return all(asked)

    assert resumes()

    def from_all(rows: list[RowControl], seconds: list[float], asked: list[int]) -> None:
        for row, took, tokens in zip(rows, seconds, asked, strict=True):
            if tokens:
                row.acceptance.took(took, tokens)

    monkeypatch.setattr(control, "learn_costs", from_all)  # the fault
    assert not resumes()


def test_a_request_that_others_leave_alone_begins_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once it has heard enough; a request that comes then hears its prompt, and is asked at once."""

    def first_asked() -> tuple[int, int]:
        world = Class(SAMPLED)
        for _ in range(400):
            world.step(world.rows, 0.05)
        row = world.rows[0]
        assert not hears(row)
        steps = [bool(world.step([row], 0.9)[0]) for _ in range(200)]
        assert all(steps[steps.index(True) :])
        fresh = world.request()
        return steps.index(True), [bool(world.step([fresh], 0.9)[0]) for _ in range(10)].index(True)

    assert first_asked() == (SETTLED - 1 + WARM, 0)
    monkeypatch.setattr(listening, "WARM", 1)  # the fault: it is asked when it knows next to nothing
    assert first_asked() == (SETTLED, 0)


def test_a_request_alone_hears_its_prompt_although_its_class_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked_at_once() -> bool:
        world = Class(SAMPLED)
        for _ in range(400):
            world.step(world.rows, 0.05)
        row = world.request()
        return bool(world.step([row], 0.9)[0]) and hears(row)

    assert asked_at_once()
    begin = KController.begin
    monkeypatch.setattr(KController, "begin", lambda self, row, requests: begin(self, row, SAMPLED))
    assert not asked_at_once()  # the fault: of the load that was


def test_a_load_that_flickers_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifteen requests where drafting pays, and sixteen where it does not: to begin and stop is worse than either."""

    def changes(often: int) -> int:
        audience, found = Audience(), []
        one = audience.join()
        for step in range(600):
            audience.weigh(step % often == 0)
            one.step()
            found.append(one.on)
        return sum(a != b for a, b in itertools.pairwise(found))

    assert changes(2) == 0
    assert changes(3) == 1, "it stops, once"
    monkeypatch.setattr(listening, "SETTLED", 1)
    assert changes(3) > 100


def test_without_costs_or_where_k_control_is_off_all_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Acceptance, "pays", lambda self, requests, judged=0.0: False)
    for controller, settings in (
        (KController(), ControlSettings()),
        (KController(StepCosts(COSTS)), ControlSettings(enabled=False)),
    ):
        (row,) = controller.rows(1, "chat", settings, 1, reads=True)
        controller.begin(row, 16)
        assert [controller.limits([row] * 16, [4] * 16) for _ in range(50)] == [[4] * 16] * 50
        assert hears(row)
