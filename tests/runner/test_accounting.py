"""What a step took is given to the requests that took part in it: all of it, and each its own part."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from engine.model.graphs import Body
from engine.model.loading import Target
from engine.runner.profile import profile_step_costs
from engine.runner.request import RequestResult
from engine.runner.runner import Runner
from engine.speculation.neural import NeuralProposer
from engine.speculation.step_costs import StepCosts
from tests.model.tape import Tape
from tests.runner.drafts import random_draft
from tests.runner.driving import NGRAM, NONE, Scripted, engine_of, oracle, request, run

SLOW = 4
PROMPTS = ([40, 41, 42, 43], [50, 51] * 4, [60, 61, 62], [70, 71] * 3)


@dataclass
class Clock:
    """Moves by a little at every look, and by what a slow drafter takes."""

    now: float = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def served(tiny: Target, costs: dict[int, float] | None = None, patience: float = 0.5) -> list[RequestResult]:
    """Four requests of three policies, begun together; the last one's drafter is slow."""
    clock = Clock()

    def think(tokens: list[int], k: int) -> list[int]:
        clock.now += patience
        return [tokens[-1]] * k

    engine = engine_of(tiny, {SLOW: Scripted(think)}, clock=clock)
    engine.control.costs = StepCosts(costs) if costs else None
    for i, (prompt, version) in enumerate(zip(PROMPTS, (NONE, NGRAM, NONE, SLOW), strict=True)):
        engine.add(request(str(i), prompt, version, max_tokens=20))
    results = run(engine)
    return [results[str(i)] for i in range(4)]


def test_costs_add_up_to_the_engines_time(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = []
    account = Runner._account

    def listen(self: Runner, decoding, drafting, choice, base_rows, before_s, pass_s) -> None:  # type: ignore[no-untyped-def]
        if decoding:
            spent.append(before_s + pass_s + self._committing)
        account(self, decoding, drafting, choice, base_rows, before_s, pass_s)

    monkeypatch.setattr(Runner, "_account", listen)
    assert sum(result.cost_s for result in served(tiny)) == pytest.approx(sum(spent))


def test_a_slow_draft_is_seen_although_it_shares_its_batch(tiny: Target) -> None:
    plain, ngram, other, slow = served(tiny)
    assert plain.verify_s == pytest.approx(other.verify_s)
    assert slow.draft_s > 100 * max(ngram.draft_s, plain.draft_s)
    assert slow.cost_s > 100 * max(plain.cost_s, ngram.cost_s)
    assert plain.other_s > 0.9 * slow.draft_s  # its neighbours waited for it; that is where they see it


def test_a_request_waits_for_all_its_decoding_time(tiny: Target) -> None:
    for result in served(tiny):
        decode = result.e2e_s - result.ttft_s  # type: ignore[operator]
        waited = result.draft_s + result.verify_s + result.other_s
        assert waited == pytest.approx(decode, rel=0.1, abs=0.2)


def test_what_plain_decoding_would_have_cost_is_its_rows_in_a_plain_pass(tiny: Target) -> None:
    results = served(tiny, {1: 1.0, 100: 100.0}, patience=0.0)  # a second a row: nothing pays, plain costs 1 s a token
    assert sum(result.counts.drafted for result in results) == 0
    steps = results[0].counts.steps
    drift = results[0].plain_s / steps  # the clock of this test is faster than the profile says, alike for all
    for result in results:
        assert result.plain_s == pytest.approx(steps * drift, rel=0.05)
        assert result.expected_accepted == 0
    assert all(result.plain_s == 0 for result in served(tiny))


def test_expected_acceptances_are_those_of_the_verified_tokens(tiny: Target) -> None:
    slow = served(tiny)[3]
    assert 0 < slow.expected_accepted < slow.counts.drafted


def test_a_capture_is_waited_for_and_charged_to_no_draft_and_no_pass(tiny: Target) -> None:
    """On CUDA a pass of a new size is captured when it first comes; what it costs later is what counts."""
    clock, tape = Clock(), Tape()

    def capture(body: Body) -> Body:
        clock.now += 1_000.0
        return tape(body)

    neural = NeuralProposer(4, random_draft(tiny), 0.0)
    engine = engine_of(tiny, {SLOW: neural}, clock=clock, capture_on=lambda device: capture)
    profile = profile_step_costs(engine.runner, (1, 8), context=16, budget_s=1e6)
    assert max(profile.values()) < 1_000
    engine.control.costs = StepCosts({rows: ms / 1e3 for rows, ms in profile.items()})
    engine.add(request("x", PROMPTS[0], SLOW, max_tokens=20))
    result = run(engine)["x"]
    assert tape.captures > 2
    assert max(result.draft_s, result.verify_s, result.cost_s, result.plain_s) < 1.0
    assert 0 < engine.control.row(SLOW, "chat", neural.control).acceptance.draft_s < 1.0
    assert engine.control.costs(8) < 1.0
    decode = result.e2e_s - result.ttft_s  # type: ignore[operator]
    assert result.draft_s + result.verify_s + result.other_s == pytest.approx(decode, abs=1.0)
    assert result.other_s > 1_000.0


def test_the_predicted_gain_is_one_where_nothing_is_drafted(tiny: Target) -> None:
    plain, ngram, other, slow = served(tiny, {1: 1.0, 100: 100.0}, patience=0.0)
    for result in (plain, other):
        assert result.expected_plain_s == pytest.approx(result.expected_cost_s)
    for result in (ngram, slow):  # they were asked, and that takes a moment
        assert 1 < result.expected_cost_s / result.expected_plain_s < 1.01
    for result in (plain, ngram, other, slow):
        assert result.expected_plain_s == pytest.approx(result.plain_s)
    assert all(result.expected_plain_s == result.expected_cost_s == 0 for result in served(tiny))


def test_the_predicted_gain_counts_expected_tokens_and_what_drafting_takes(tiny: Target) -> None:
    """Rows are free in this world: every step costs its drafting and the same pass, shared by its rows."""
    clock = Clock()

    def think(tokens: list[int], k: int) -> list[int]:
        clock.now += 0.01 * k
        return [tokens[-1]] * k

    engine = engine_of(tiny, {SLOW: Scripted(think)}, clock=clock)
    engine.control.costs = StepCosts({1: 1.0, 100: 1.0})
    engine.control.costs.observe = lambda rows, seconds: None  # type: ignore[method-assign]
    engine.add(request("alone", PROMPTS[3], SLOW, max_tokens=20))
    result = run(engine)["alone"]
    steps = result.counts.steps
    assert result.counts.drafted
    assert result.expected_plain_s == pytest.approx(steps + result.expected_accepted)
    assert steps < result.expected_cost_s < steps + 0.1 * result.counts.drafted


def test_what_a_stop_cuts_off_is_no_gain(tiny: Target) -> None:
    """Plain decoding would not have made those tokens either."""

    def respond(known: tuple[int, ...], eos: frozenset[int]) -> RequestResult:
        engine = engine_of(tiny, {SLOW: oracle({tuple(PROMPTS[0]): known})}, clock=Clock())
        engine.control.costs = StepCosts({1: 1.0, 100: 1.0})
        engine.control.costs.observe = lambda rows, seconds: None  # type: ignore[method-assign]
        engine.add(request("x", PROMPTS[0], SLOW, max_tokens=20))
        engine._lives["x"]._eos = eos
        return run(engine)["x"]

    whole = respond((), frozenset()).payload.output_ids
    cut = respond(whole, frozenset({whole[2]}))  # all that is drafted is right, and its second token is the last
    assert (cut.payload.output_ids, cut.counts.steps) == (whole[:3], 1)
    assert cut.plain_s == pytest.approx(2.0)  # the first token is the prompt's


def test_beside_a_prompt_plain_decoding_gains_nothing(tiny: Target) -> None:
    """A pass with a prompt in it is not what a profile of decoding rows says of so many."""
    engine = engine_of(tiny, clock=Clock(), prefill_chunk=8)
    engine.control.costs = StepCosts({1: 1.0, 100: 100.0})
    engine.add(request("x", PROMPTS[0], NONE, max_tokens=20))
    engine.step()
    engine.add(request("prompt", [50, 51] * 8, NONE))
    times = engine._lives["x"].times
    for prompt in (True, True, False):
        plain_s, cost_s = times.plain, times.cost - times.draft  # to find that none drafts, this clock is looked at
        engine.step()
        ratio = (times.plain - plain_s) / (times.cost - times.draft - cost_s)
        assert ratio == pytest.approx(1.0) if prompt else ratio > 10, ratio


def test_beside_a_prompt_drafted_rows_are_measured_by_the_profile(tiny: Target) -> None:
    engine = engine_of(tiny, {SLOW: Scripted(lambda tokens, k: [tokens[-1]] * k)}, clock=Clock(), prefill_chunk=8)
    engine.control.costs = StepCosts({1: 1.0, 9: 1.0, 13: 2.0})  # nine rows without drafts; four more double the pass
    engine.add(request("x", PROMPTS[0], SLOW, max_tokens=20))
    engine.control.costs.observe = lambda rows, seconds: None  # type: ignore[method-assign]
    engine.step()
    engine.add(request("prompt", [50, 51] * 4, NONE))
    live = engine._lives["x"]
    live.controls[0].settings = replace(live.controls[0].settings, enabled=False)  # all that is drafted is verified
    times, before = live.times, len(live.seq.token_ids)
    verify_s, other_s = times.verify, times.other
    engine.step()
    pass_s, other_s = times.verify - verify_s, times.other - other_s
    emitted = len(live.seq.token_ids) - before
    assert times.plain == pytest.approx(emitted * (pass_s / 2 / 9 + other_s))
