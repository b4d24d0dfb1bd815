"""K control in simulated worlds: it never costs, it pays where drafting pays, and planted faults are seen."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from engine.contracts import SlipstreamError, VerifyStep
from engine.speculation import acceptance as learned
from engine.speculation.acceptance import JUDGED, WORTH_STEPS, Acceptance, ControlSettings
from engine.speculation.control import MOST_KEPT, KController, Offer, RowControl, allocate, learn_worth
from engine.speculation.replay import verify_stored
from engine.speculation.step_costs import StepCosts

MEASURED = {1: 23, 2: 24, 3: 34, 4: 32, 5: 40, 8: 51, 16: 70, 32: 104, 64: 194}  # ms, docs/log.md
FLAT = {1: 30, 80: 30}
STEEP = {1: 10, 80: 800}


def seconds(profile: dict[int, int]) -> dict[int, float]:
    return {rows: ms / 1e3 for rows, ms in profile.items()}


def judge(row: RowControl, asked: int, confidence: Sequence[float], committed: list[int], verified: int) -> None:
    """A draft of as many zeros as were ``asked``, the first of them ``verified``."""
    row.settle(verify_stored([0] * verified, committed), asked, confidence)
    row.observe(asked, [0] * asked, confidence, committed)


@pytest.mark.parametrize("seed", range(30))
def test_allocation_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    survivals = [
        list(itertools.accumulate((rng.random() for _ in range(rng.randint(0, 3))), lambda a, b: a * b))
        for _ in range(4)
    ]
    table = [sum(rng.random() for _ in range(rows + 1)) + 1 for rows in range(40)]  # rising, bumpy

    def rate(ks: Sequence[int]) -> float:
        gained = sum(sum(draft[:k]) for draft, k in zip(survivals, ks, strict=True))
        return (4 + gained) / table[4 + sum(ks)]

    best = max(rate(ks) for ks in itertools.product(*(range(len(draft) + 1) for draft in survivals)))
    assert rate(allocate(survivals, 4, 4, table.__getitem__)) == pytest.approx(best)


def test_nothing_is_drafted_for_less_than_the_wanted_gain() -> None:
    costs = StepCosts({1: 1.0, 2: 1.0})
    assert allocate([[0.01]], 1, 1, costs, min_gain=0.02) == [0]
    assert allocate([[0.03]], 1, 1, costs, min_gain=0.02) == [1]


@dataclass
class World:
    """Requests whose drafts are right with a probability of their own, on a machine with given costs."""

    profile: dict[int, int]
    right: Callable[[int], float]  # request → probability that a drafted token is right
    requests: int = 1
    k: int = 4
    confidence: Callable[[float], float] | None = None  # what the drafter says of it
    noise: float = 0.1
    seed: int = 0
    draft_s: float = 0.0
    prior: float = 0.5
    costs: StepCosts = field(init=False)

    def __post_init__(self) -> None:
        self.rng, self.true = random.Random(self.seed), StepCosts(seconds(self.profile))
        self.costs = StepCosts(seconds(self.profile))
        self.settings = ControlSettings(prior=self.prior)

    def run(self, steps: int = 600, believed: StepCosts | None = None) -> tuple[float, float]:
        """(tokens per second over plain decoding's on the same machine, drafted tokens verified per row and step)."""
        controller = KController(believed or self.costs)
        rows = [controller.row(1, "chat", self.settings) for _ in range(self.requests)]
        tokens = spent = drafted = 0.0
        for _ in range(steps):
            asked = controller.limits(rows, [self.k] * len(rows))
            truth = [[self.rng.random() < self.right(i) for _ in range(n)] for i, n in enumerate(asked)]
            sure = [
                [self.confidence(self.right(i)) for _ in range(n)] if self.confidence else []
                for i, n in enumerate(asked)
            ]
            offers = [Offer(row, n, c) for row, n, c in zip(rows, asked, sure, strict=True)]
            choice = controller.choose(offers)
            count = len(rows) + sum(choice.ks)
            took = self.true(count) * self.rng.uniform(1 - self.noise, 1 + self.noise)
            controller.costs.observe(count, took)  # type: ignore[union-attr]
            for row, n, c, right, k in zip(rows, asked, sure, truth, choice.ks, strict=True):
                row.acceptance.took(self.draft_s, 1) if n else None
                accepted = next((at for at, yes in enumerate(right[:k]) if not yes), k)
                committed = [0] * accepted + [0 if accepted < n and right[accepted] else 1]
                if n:
                    judge(row, n, c, committed, k)
                tokens, spent = tokens + accepted + 1, spent + self.draft_s * n
            spent, drafted = spent + took, drafted + sum(choice.ks)
        return tokens / spent * self.true(len(rows)) / len(rows), drafted / steps / len(rows)


def test_it_switches_off_where_nothing_is_accepted() -> None:
    for profile in (MEASURED, STEEP):
        gain, drafted = World(profile, lambda i: 0.0).run(3_000)
        assert drafted < 0.05
        assert gain > 0.98


def test_it_drafts_all_where_all_is_accepted_and_rows_are_free() -> None:
    gain, drafted = World(FLAT, lambda i: 1.0).run()
    assert drafted > 3.99
    assert gain == pytest.approx(5, rel=0.02)


@pytest.mark.parametrize("requests", [1, 4, 16])
@pytest.mark.parametrize("right", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("profile", [MEASURED, STEEP, FLAT], ids=["measured", "steep", "flat"])
def test_it_is_never_slower_than_plain_decoding(profile: dict[int, int], right: float, requests: int) -> None:
    assert World(profile, lambda i: right, requests).run(400)[0] > 0.98


@pytest.mark.parametrize("said", [lambda p: 0.95, lambda p: 0.05, lambda p: p], ids=["boastful", "shy", "honest"])
def test_a_drafters_confidence_is_checked_against_what_happens(said: Callable[[float], float]) -> None:
    assert World(MEASURED, lambda i: 0.05, 16, confidence=said).run()[0] > 0.98
    assert World(MEASURED, lambda i: 0.95, 1, confidence=said).run(1500)[0] > 2.0


def test_a_prompt_beside_them_makes_no_unlikely_token_worth_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass takes a second with the prompt; a token of four rows, 8 ms apiece, must still bring what others do."""
    controller = KController(StepCosts(seconds(MEASURED)))
    rows = [controller.row(1, "chat", ControlSettings()) for _ in range(4)]

    def drafted(chance: float, prompt_rows: int) -> int:
        offers = [Offer(row, 4, [chance] * 4) for row in rows]
        return sum(controller.choose(offers, prompt_rows).ks)

    rows[0].acceptance.draft_s = 0.008  # of all four: too dear, though a hundredth of the pass with the prompt
    assert controller.limits(rows, [4] * 4) == controller.limits(rows, [4] * 4, 300) == [0] * 4
    assert drafted(0.2, 0) == drafted(0.2, 300) == 0
    assert drafted(0.9, 300) == 16
    assert controller.choose([], 300).ks == []
    monkeypatch.setattr(KController, "_decoding_costs", lambda self, decoding, prompt_rows: self.costs)
    assert drafted(0.2, 300) > 0


def test_a_good_row_is_drafted_for_beside_bad_ones() -> None:
    world = World(MEASURED, lambda i: 0.97 if i < 2 else 0.02, 8)
    gain, drafted = world.run(800)
    assert gain > 1.15
    assert drafted < 1.5


def test_what_was_switched_off_by_itself_comes_back() -> None:
    world = World(MEASURED, lambda i: 0.0)
    controller = KController(world.costs)
    row = controller.row(1, "chat", ControlSettings(memory=200))

    def step(right: bool) -> int:
        k = controller.choose([Offer(row, 4)]).ks[0]
        committed = [0] * (k + 1) if right else [1]
        judge(row, 4, (), committed, k)
        return k

    for _ in range(300):
        step(False)
    assert sum(step(False) for _ in range(50)) == 0
    assert sum(step(True) for _ in range(400)) > 0
    assert step(True) >= 3


def asked(
    controller: KController,
    rows: Sequence[RowControl],
    chance: float,
    steps: int = 640,
    brought: float = 1.0,
    row_s: float = 0.0,
) -> float:
    """How many of the rows' drafters, which take next to no time, were asked in the last steps, as a share. Of what is
    promised so much is ``brought``; a drafted row takes ``row_s`` more than was profiled."""
    found = list[float]()
    for _ in range(steps):
        limits = controller.limits(rows, [4] * len(rows))
        for row, n in zip(rows, limits, strict=True):
            row.acceptance.took(1e-5, n) if n else None
        choice = controller.choose([Offer(row, n, [chance] * n) for row, n in zip(rows, limits, strict=True)])
        kept = [brought * tokens for tokens in choice.expected]
        learn_worth([[row] for row in rows], [0] * len(rows), choice, kept, choice.pass_s + row_s * sum(choice.ks))
        found.append(sum(map(bool, limits)) / len(rows))
    return sum(found[steps // 2 :]) / (steps // 2)


def test_a_cheap_drafter_is_left_alone_but_for_probes_where_asking_saves_less_than_it_takes() -> None:
    """Beside sixteen requests, and still asked alone, where the same tokens are worth their rows."""
    controller = KController(StepCosts(seconds(MEASURED)))
    rows = [controller.row(1, "chat", ControlSettings()) for _ in range(16)]
    assert asked(controller, rows[:1], 0.6) == 1
    assert asked(controller, rows, 0.3) < 0.1
    assert asked(controller, rows[:1], 0.6) == 1
    assert asked(controller, rows, 0.95) > 0.9  # a probe has found that it pays


def test_asking_pays_by_what_was_accepted_and_by_what_the_pass_took() -> None:
    for brought, row_s, pays in ((1.0, 0.0, True), (0.4, 0.0, False), (1.0, 0.003, False)):
        controller = KController(StepCosts(seconds(MEASURED)))
        rows = [controller.row(1, "chat", ControlSettings()) for _ in range(16)]
        share = asked(controller, rows, 0.9, brought=brought, row_s=row_s)
        assert share > 0.9 if pays else share < 0.1, (brought, row_s, share)


def test_one_late_pass_does_not_switch_a_drafter_off() -> None:
    controller = KController(StepCosts(seconds(MEASURED)))
    rows = [controller.row(1, "chat", ControlSettings()) for _ in range(16)]
    asked(controller, rows, 0.9)
    choice = controller.choose([Offer(row, 1, [0.9]) for row in rows])
    learn_worth([[row] for row in rows], [0] * 16, choice, choice.expected, 1_000 * choice.pass_s)
    assert rows[0].acceptance.pays(16)


def test_all_requests_of_a_class_are_probed_in_the_same_step() -> None:
    """A pass of a neural draft over all of them takes hardly longer than over one."""
    controller, settings = KController(StepCosts(seconds(MEASURED))), ControlSettings(probe_every=10)
    rows = [controller.row(1, "chat", settings) for _ in range(16)]
    rows[0].acceptance.took(0.004, 1)
    for row in rows:
        judge(row, 4, (), [1], 4)
    for _ in range(100):
        judge(rows[0], 4, (), [1], 4)
    steps = [controller.limits(rows, [4] * 16) for _ in range(50)]
    assert [sum(map(bool, limits)) for limits in steps if any(limits)] == [16] * 5


def test_a_policy_of_two_parts_goes_on_asking_the_one_that_pays() -> None:
    """What costs passes brings nothing here, or what costs nothing does."""
    for paying in (0, 1):
        controller = KController(StepCosts(seconds(MEASURED)))
        parts = controller.rows(1, "chat", ControlSettings(), 2)
        asked = [0, 0]
        for step in range(800):
            (limit,) = controller.limits(parts[1:], [4])
            if limit:
                parts[1].acceptance.took(0.004 * limit, limit)
            choice = controller.choose([Offer(parts[paying], 1, [0.9])])
            for speaker, row in enumerate(parts):
                bring = 1.0 if speaker == paying else 0.0
                if row.asked:
                    judge(row, 1, (), [0, 0] if bring else [1], 1)
                    asked[speaker] += step >= 400
            kept = [0.9] if parts[paying].asked else [0.0]
            learn_worth([parts], [paying], choice, kept, choice.pass_s)
        assert asked[paying] > 350
        assert asked[1 - paying] < 50


def test_what_asking_saves_is_counted_to_the_class_that_brings_it() -> None:
    """One request of a class whose drafts are right beside fifteen of one whose drafts are not."""
    controller = KController(StepCosts(seconds(MEASURED)))
    chances = {"code": 0.95, "chat": 0.2}
    rows = [(name, controller.row(1, name, ControlSettings())) for name in ("code", *["chat"] * 15)]
    found: dict[str, list[bool]] = {name: [] for name in chances}
    for _ in range(400):
        limits = controller.limits([row for _, row in rows], [4] * 16)
        offers = []
        for (name, row), n in zip(rows, limits, strict=True):
            row.acceptance.took(1e-5, n) if n else None
            offers.append(Offer(row, n, [chances[name]] * n))
            found[name].append(bool(n))
        choice = controller.choose(offers)
        learn_worth([[row] for _, row in rows], [0] * 16, choice, choice.expected, choice.pass_s)
    assert sum(found["code"][-100:]) == 100
    assert sum(found["chat"][-1_500:]) < 150


@pytest.mark.parametrize(("requests", "most"), [(1, 10), (3, 30), (4, 40), (16, 160), (100, 160)])
def test_probes_that_find_nothing_come_at_twice_the_distance_each_time(requests: int, most: int) -> None:
    """And as often as at first once asking pays. Probes that ask many come more rarely."""
    acceptance = Acceptance(ControlSettings(probe_every=10))
    acceptance.took(1e-3, 4)
    for _ in range(WORTH_STEPS):
        acceptance.saved(requests, 0.0)
    distances = _distances(acceptance, requests, 8)
    expected = [min(10 * 2**doubled, most) for doubled in range(8)]
    assert distances == expected
    for _ in range(200):
        acceptance.saved(requests, 0.01)
    assert _distances(acceptance, requests, 3)[1:] == [10, 10]


def test_drafts_that_were_wrong_for_long_are_found_right_as_soon_by_rare_probes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a token is worth, and whether verified ones keep their promises, must be learned anew before asking pays."""
    found = list[int]()
    for rarest in (1, learned.RAREST):
        monkeypatch.setattr(learned, "RAREST", rarest)
        controller = KController(StepCosts(seconds(MEASURED)))
        rows = [controller.row(1, "chat", ControlSettings()) for _ in range(16)]
        for _ in range(6_000):
            _sure_of_one(controller, rows, right=False)
        steps = 0
        while not rows[0].acceptance.pays(16) and steps < 100_000:
            _sure_of_one(controller, rows, right=True)
            steps += 1
        found.append(steps)
    gap = ControlSettings().probe_every * learned.RAREST
    assert found[1] < found[0] + 4 * gap, found  # after four probes of sixteen requests; fourteen by frequent ones


def _sure_of_one(controller: KController, rows: Sequence[RowControl], right: bool) -> None:
    """A step in which every drafter that is asked is sure of one token, and all are right or none."""
    limits = controller.limits(rows, [1] * len(rows))
    choice = controller.choose([Offer(row, n, [0.9] * n) for row, n in zip(rows, limits, strict=True)])
    for row, n, k in zip(rows, limits, choice.ks, strict=True):
        if n:
            row.acceptance.took(1e-5, n)
            judge(row, n, [0.9], [0, 0] if right else [1], k)
    learn_worth([[row] for row in rows], [0] * len(rows), choice, [k * right for k in choice.ks], choice.pass_s)


def test_a_load_that_goes_by_the_next_one_has_its_own_verdict_soon() -> None:
    """In steps that its probes stand for, not in probes."""
    controller = KController(StepCosts(seconds(MEASURED)))
    rows = [controller.row(1, "chat", ControlSettings()) for _ in range(16)]
    assert asked(controller, rows, 0.3, steps=4_000) < 0.1
    assert asked(controller, rows[:12], 0.95, steps=3_000) > 0.9


def test_the_first_step_after_another_load_is_one_step() -> None:
    """A late one does not switch off a drafter that pays at this load, for all that did not ask at the other."""
    controller = KController(StepCosts(seconds(MEASURED)))
    rows = [controller.row(1, "chat", ControlSettings()) for _ in range(16)]
    assert asked(controller, rows[:1], 0.6) == 1
    assert asked(controller, rows, 0.3, steps=2_000) < 0.1
    while not any(controller.limits(rows, [4] * 16)):  # prompts beside: nothing is learned
        pass
    for _ in range(200):
        assert not any(controller.limits(rows, [4] * 16))
    acceptance, (_, before) = rows[0].acceptance, rows[0].acceptance._saved[1]
    acceptance.ask_s = 0.95 * before / JUDGED  # it just pays
    assert controller.limits(rows[:1], [4]) == [4]
    choice = controller.choose([Offer(rows[0], 1, [0.6])])
    learn_worth([rows[:1]], [0], choice, choice.expected, 1_000 * choice.pass_s)
    assert acceptance.pays(1)


def _distances(acceptance: Acceptance, requests: int, count: int) -> list[int]:
    """Steps until each of the next probes."""
    found = list[int]()
    while len(found) < count:
        steps = 1
        while not acceptance.probe(requests, requests):
            steps += 1
        found.append(steps)
    return found


def test_whether_asking_pays_waits_for_experience_and_counts_the_judging() -> None:
    acceptance = Acceptance(ControlSettings())
    acceptance.took(1e-3, 4)
    for step in range(WORTH_STEPS):
        assert acceptance.pays(16), step
        acceptance.saved(16, JUDGED * 0.99e-3)
    assert not acceptance.pays(16)
    assert not acceptance.pays(31)
    assert not acceptance.pays(15)  # the next load, of which nothing is known
    assert acceptance.pays(7)  # another
    for _ in range(WORTH_STEPS):
        acceptance.saved(8, 2 * JUDGED * acceptance.ask_s)
    assert acceptance.pays(15)  # which goes by its own steps then
    for _ in range(100):
        acceptance.saved(16, JUDGED * 1.01e-3)
    assert acceptance.pays(16)


def test_a_drafter_that_costs_time_is_left_alone_but_for_probes() -> None:
    controller = KController(StepCosts(seconds(MEASURED)))
    row = controller.row(1, "chat", ControlSettings(probe_every=10))
    row.acceptance.took(0.004, 1)
    asked = []
    for _ in range(400):
        (n,) = controller.limits([row], [4])
        asked.append(n)
        if n:
            judge(row, n, (), [1], n)
    assert sum(asked[-100:]) == 10
    for _ in range(4_000):
        (n,) = controller.limits([row], [4])
        if n:
            judge(row, n, (), [0] * (n + 1), n)
    assert n >= 3


def test_a_dear_drafter_is_probed_in_a_class_of_short_answers() -> None:
    controller = KController(StepCosts(seconds(MEASURED)))
    settings, asked = ControlSettings(probe_every=10), list[int]()
    controller.row(1, "chat", settings).acceptance.took(0.004, 1)
    for request in range(1_000):  # drafts are wrong at first, and right later on
        row = controller.row(1, "chat", settings)
        for _ in range(8):
            (n,) = controller.limits([row], [4])
            asked.append(n)
            if n:
                judge(row, n, (), [0] * (n + 1) if request > 200 else [1], n)
    assert sum(asked[800:1_600]) == 80
    assert asked[-1] >= 3


def test_experience_is_kept_of_the_classes_used_last_only() -> None:
    controller, settings = KController(), ControlSettings()
    known = controller.row(1, "chat", settings).acceptance
    for i in range(3 * MOST_KEPT):
        controller.row(1, f"made up {i}", settings)
        assert controller.row(1, "chat", settings).acceptance is known
    assert len(controller._acceptance) == MOST_KEPT


def test_what_one_part_of_a_policy_is_sure_of_says_nothing_of_another() -> None:
    controller, settings = KController(StepCosts({1: 1.0, 2: 1.01})), ControlSettings()
    first, second = (controller.row(1, "chat", settings, part) for part in (0, 1))
    for _ in range(200):
        judge(first, 1, [0.5], [0, 0], 1)
        judge(second, 1, [0.5], [1], 1)
    assert first.survivals(1, [0.5])[0] > 0.8 > 0.2 > second.survivals(1, [0.5])[0]
    controller.forget(1)
    assert controller.row(1, "chat", settings, 1).acceptance is not second.acceptance


def test_a_dear_drafter_is_never_slower_either() -> None:
    for right in (0.0, 0.4, 0.8):
        assert World(MEASURED, lambda i, p=right: p, draft_s=0.003).run(1500)[0] > 0.97  # type: ignore[misc]


def test_a_policy_without_control_drafts_what_it_likes() -> None:
    controller = KController(StepCosts(seconds(STEEP)))
    row = controller.row(1, "chat", ControlSettings(enabled=False))
    assert controller.limits([row], [4]) == [4]
    assert controller.choose([Offer(row, 4)]).ks == [4]


def test_without_costs_nothing_is_cut() -> None:
    controller = KController()
    row = controller.row(1, "chat", ControlSettings())
    assert controller.choose([Offer(row, 3)]).ks == [3]


def test_expected_acceptances_are_met() -> None:
    """The probabilities are calibrated: what the choice promises is what comes."""
    acceptance, rng = Acceptance(ControlSettings()), random.Random(0)
    promised = kept = 0.0
    for _ in range(300):
        row, p = RowControl(acceptance), rng.choice([0.2, 0.9])
        for _ in range(20):
            promised += sum(row.survivals(4, ()))
            right = [rng.random() < p for _ in range(4)]
            agreed = next((at for at, yes in enumerate(right) if not yes), 4)
            kept += agreed
            judge(row, 4, (), [0] * agreed + [1], 4)
    assert promised == pytest.approx(kept, rel=0.15)


def cursed(steps: int = 1_200) -> float:
    """Tokens per second over plain decoding's where the tokens that are chosen are those whose chance is guessed too
    high: right in .9 of cases, but in .3 of those in which they are verified."""
    rng, controller = random.Random(0), KController(StepCosts(seconds(MEASURED)))
    rows = [controller.row(1, "chat", ControlSettings()) for _ in range(16)]
    tokens = spent = 0.0
    for step in range(steps):
        choice = controller.choose([Offer(row, 1, [rng.uniform(0.5, 1.0)]) for row in rows])
        for row, k in zip(rows, choice.ks, strict=True):
            right = rng.random() < (0.3 if k else 0.9)
            judge(row, 1, [0.9], [0, 0][: 1 + k] if right else [1], k)
            if step >= steps // 4:
                tokens += 1 + (k and right)
        if step >= steps // 4:
            spent += controller.costs(len(rows) + sum(choice.ks))  # type: ignore[misc]
    return tokens / spent * StepCosts(seconds(MEASURED))(16) / 16


def test_chosen_tokens_are_worth_what_chosen_tokens_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cursed() > 0.98
    monkeypatch.setattr(Acceptance, "settle", lambda *_: None)  # fault: never asks what its choice brought
    assert cursed() < 0.95


def test_a_class_whose_promises_were_broken_is_given_another_chance() -> None:
    acceptance = Acceptance(ControlSettings(memory=200))
    for _ in range(100):
        acceptance.settle(1.0, 0.2)
    assert acceptance.honesty < 0.5
    for _ in range(1_000):
        acceptance.settle(0.0, 0.0)
    assert acceptance.honesty > 0.98


class Blind(StepCosts):
    """Fault: believes every row is free."""

    def __call__(self, rows: int) -> float:
        return super().__call__(1)


def test_faults_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def bad() -> float:
        return World(MEASURED, lambda i: 0.1, 16, prior=0.8).run(600)[0]

    assert bad() > 0.98
    assert World(MEASURED, lambda i: 0.1, 16).run(300, Blind(seconds(MEASURED)))[0] < 0.95
    with monkeypatch.context() as patch:  # never learns
        patch.setattr(Acceptance, "observe", lambda *_: None)
        patch.setattr(RowControl, "luck", 1.0)
        assert bad() > 0.95, "what its choices brought would do"
        patch.setattr(Acceptance, "settle", lambda *_: None)
        assert bad() < 0.95
    with monkeypatch.context() as patch:  # takes every chance for a certainty
        patch.setattr(RowControl, "survivals", lambda self, count, confidence: [0.99] * count)
        assert bad() < 0.95


def test_costs_follow_the_machine() -> None:
    costs, rng = StepCosts(seconds(MEASURED)), random.Random(0)
    true = {rows: ms * (3 if rows >= 8 else 2) / 1e3 for rows, ms in MEASURED.items()}
    for _ in range(4_000):
        rows = rng.choice(list(true))
        costs.observe(rows, true[rows] * rng.uniform(0.8, 1.25))
    assert all(costs(rows) == pytest.approx(s, rel=0.1) for rows, s in true.items())


def test_costs_are_the_mean_of_passes_long_ones_included() -> None:
    """Planted: by logarithms 1.088, and drafted rows whose passes take their mean seem late."""
    costs, believed = StepCosts({16: 1.0}), list[float]()
    for number in range(4_000):
        costs.observe(16, 1.4 if number % 4 == 3 else 1.0)
        believed.append(costs(16))
    assert sum(believed[2_000:]) / 2_000 == pytest.approx(1.1, abs=0.005)


def test_costs_between_and_beyond_what_was_profiled() -> None:
    costs = StepCosts({1: 1.0, 3: 3.0, 5: 4.0})
    assert [costs(rows) for rows in (1, 2, 3, 4, 5, 7)] == pytest.approx([1, 2, 3, 3.5, 4, 5])
    assert StepCosts({4: 2.0})(9) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="positive"):
        StepCosts({})


@pytest.mark.parametrize("given", [{"k": 1}, {"enabled": 1}, {"prior": 1.5}, {"probe_every": 0}, {"memory": "x"}])
def test_settings_are_strict(given: dict[str, object]) -> None:
    with pytest.raises(SlipstreamError):
        ControlSettings.read(given)


def test_a_drafter_answers_for_its_own_tokens() -> None:
    """Another went on behind its two, and is always wrong."""
    sure = [0.9] * 6
    honest = {own: KController().row(1, "code", ControlSettings()) for own in (2, 6)}
    for own, row in honest.items():
        for _ in range(100):
            row.settle(VerifyStep((0,) * 6, 2, 3), own, sure)
    assert honest[2].acceptance.honesty == 1.0
    assert honest[6].acceptance.honesty < 0.6  # fault: the tail is held against the draft
