from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from engine.contracts import FinishReason, SlipstreamError, Status, VerifyStep
from engine.model.loading import Target
from engine.runner.engine import InvalidRequest, PolicyNotResident
from engine.runner.profile import profile_step_costs
from engine.scheduler.errors import QueueFull, RequestTooLong
from engine.speculation.ngram import NgramProposer
from engine.speculation.replay import replay
from tests.runner.driving import NGRAM, NONE, Scripted, alone, engine_of, oracle, request, run

SPECIAL = 4
PROMPT = [40, 41, 42, 43, 44, 45]


def test_max_tokens_is_met_exactly(tiny: Target) -> None:
    for limit in (1, 2, 3, 7):
        for version in (NONE, NGRAM):
            result = alone(tiny, request("x", PROMPT, version, max_tokens=limit))
            assert (result.output_tokens, result.finish_reason, result.status) == (
                limit,
                FinishReason.LENGTH,
                Status.OK,
            )


def test_eos_ends_a_response_inside_a_draft_and_cuts_the_tail(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = alone(tiny, request("x", PROMPT, max_tokens=30)).payload.output_ids
    end = next(i for i in range(8, 30) if plain[i] not in plain[:i])
    monkeypatch.setitem(tiny.tokenizer.__dict__, "eos_ids", frozenset({plain[end]}))
    guide = oracle({tuple(PROMPT): plain})
    result = alone(tiny, request("x", PROMPT, SPECIAL, max_tokens=30, ignore_eos=False), {SPECIAL: guide})
    assert result.payload.output_ids == plain[: end + 1]
    assert result.finish_reason is FinishReason.STOP
    assert result.counts.accepted == result.counts.drafted  # the tail counts neither way
    assert sum(step.emitted for step in result.payload.steps) == end
    assert replay(guide, "chat", PROMPT, result.payload.output_ids, max_tokens=30) == result.counts


def readable(target: Target) -> tuple[list[int], str]:
    """A response whose text has a long stretch of plain letters, made by an obliging target."""
    text = "the one in the ring and then the other one again"
    return target.tokenizer.encode(text), text


@pytest.fixture
def speaking(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> Target:
    """The tiny target made to say a given text: its logits point at the token that follows in it."""
    ids, _ = readable(tiny)
    model = tiny.model
    forward, logits = model.forward_with_aux, model.logits

    def next_ids(batch: object, cache: object, layers: object) -> object:
        hidden, aux = forward(batch, cache, layers)  # type: ignore[arg-type]
        hidden = hidden.clone()
        hidden[:, 0] = batch.positions.to(hidden.dtype)  # type: ignore[attr-defined]
        return hidden, aux

    def pointed(hidden: object) -> object:
        out = logits(hidden).zero_()  # type: ignore[arg-type]
        for row, position in enumerate(hidden[:, 0].tolist()):  # type: ignore[index]
            out[row, ids[(int(position) - len(PROMPT) + 1) % len(ids)]] = 1.0
        return out

    monkeypatch.setattr(model, "forward_with_aux", next_ids)
    monkeypatch.setattr(model, "logits", pointed)
    return tiny


def test_the_speaking_target_speaks(speaking: Target) -> None:
    ids, text = readable(speaking)
    assert alone(speaking, request("x", PROMPT, max_tokens=len(ids))).text == text


@pytest.mark.parametrize("stop", ["ring", "the ring", "g and t", "other", "in the rin", "one", "t"])
@pytest.mark.parametrize("version", [NONE, NGRAM, SPECIAL])
def test_stop_strings_anywhere_in_tokens_and_drafts(speaking: Target, stop: str, version: int) -> None:
    ids, text = readable(speaking)
    extra = {SPECIAL: oracle({tuple(PROMPT): tuple(ids)})}
    result = alone(speaking, request("x", PROMPT, version, max_tokens=len(ids), stop=(stop, "never said")), extra)
    assert result.text == text[: text.index(stop)]
    assert result.finish_reason is FinishReason.STOP
    said = speaking.tokenizer.decode(result.payload.output_ids)
    assert stop in said  # the token that completed it is the last
    assert stop not in speaking.tokenizer.decode(result.payload.output_ids[:-1])
    assert 1 + sum(step.emitted for step in result.payload.steps) == result.output_tokens
    assert all(step.accepted <= len(step.proposed) for step in result.payload.steps)


def test_text_that_only_began_a_stop_string_is_handed_out(speaking: Target) -> None:
    ids, text = readable(speaking)
    result = alone(speaking, request("x", PROMPT, max_tokens=len(ids), stop=("again and again", "ringx")))
    assert (result.text, result.finish_reason) == (text, FinishReason.LENGTH)


def test_cancel_frees_the_slot_at_once(tiny: Target) -> None:
    engine = engine_of(tiny, max_num_seqs=1)
    engine.add(request("a", PROMPT))
    engine.add(request("b", PROMPT))
    engine.step()
    engine.step()
    output = engine.cancel("a", Status.TIMEOUT)
    assert output is not None
    assert output.result is not None
    assert (output.result.status, output.result.output_tokens) == (Status.TIMEOUT, 2)
    engine.check_integrity()
    assert engine.cancel("a") is None
    engine.step()
    assert list(engine.scheduler.running) == ["b"]
    waiting = engine.cancel("b")
    assert waiting is not None
    assert not engine.has_work
    assert engine.step() == []


def test_times_come_from_the_clock_and_add_up(tiny: Target) -> None:
    result = alone(tiny, request("x", PROMPT, NGRAM, max_tokens=12))
    assert result.queue_s is not None
    assert result.ttft_s is not None
    assert result.tpot_s == pytest.approx((result.e2e_s - result.ttft_s) / 11)
    assert 0 < result.queue_s < result.ttft_s < result.e2e_s
    assert (result.prefill_s, result.draft_s, result.verify_s) == (1, result.counts.steps, result.counts.steps)
    assert result.queue_s + result.prefill_s + result.draft_s + result.verify_s <= result.e2e_s
    assert alone(tiny, request("x", PROMPT, max_tokens=1)).tpot_s is None


def test_a_request_keeps_the_proposer_it_began_with(tiny: Target) -> None:
    engine = engine_of(tiny, {SPECIAL: NgramProposer(2)})
    engine.add(request("x", [50, 51] * 6, SPECIAL, max_tokens=20))
    first = engine.step()
    engine.unload(SPECIAL)
    with pytest.raises(PolicyNotResident):
        engine.add(request("y", PROMPT, SPECIAL))
    assert engine.resident == (NONE, NGRAM)
    engine.load(SPECIAL, NgramProposer(4))
    counts = run(engine, first)["x"].counts
    assert len(counts.drafted_per_pos) <= 2
    assert counts.drafted


def test_versions_never_change(tiny: Target) -> None:
    engine = engine_of(tiny)
    with pytest.raises(SlipstreamError, match="never change"):
        engine.load(NGRAM, NgramProposer(2))


def fail(tokens: list[int], k: int) -> list[int]:
    raise RuntimeError("broken draft")


@pytest.mark.parametrize("think", [fail, lambda tokens, k: [1] * (k + 1), lambda tokens, k: [10**6], lambda t, k: [-1]])
def test_a_broken_proposer_costs_its_drafts_and_nothing_else(tiny: Target, think: object) -> None:
    want = alone(tiny, request("x", PROMPT)).payload.output_ids
    engine = engine_of(tiny, {SPECIAL: Scripted(think)})
    engine.add(request("x", PROMPT, SPECIAL))
    result = run(engine)["x"]
    assert result.status is Status.OK
    assert result.payload.output_ids == want
    # Every step but the last, which has no room for a draft.
    assert result.draft_errors == engine.stats()["draft_errors"] == len(want) - 2


def test_a_proposer_that_fails_now_and_then_keeps_drafting(tiny: Target) -> None:
    known = alone(tiny, request("x", PROMPT)).payload.output_ids
    guide = oracle({tuple(PROMPT): known})

    def moody(tokens: Sequence[int], k: int) -> list[int]:
        if len(tokens) % 2:
            raise RuntimeError("not now")
        return guide.think(tokens, k)  # type: ignore[operator]

    result = alone(tiny, request("x", PROMPT, SPECIAL), {SPECIAL: Scripted(moody)})
    assert result.payload.output_ids == known
    assert result.draft_errors > 0
    assert result.counts.accepted > 0


def test_a_failing_step_ends_its_requests_and_the_engine_lives_on(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny, max_num_seqs=2)
    for name in "abc":
        engine.add(request(name, PROMPT))
    outputs = engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(tiny.model, "logits", fail)
        outputs += engine.step()
    engine.check_integrity()
    results = run(engine, outputs)
    assert engine.stats()["step_errors"] == 1
    assert [results[name].status for name in "abc"] == [Status.ERROR, Status.ERROR, Status.OK]
    assert results["c"].payload.output_ids == alone(tiny, request("x", PROMPT)).payload.output_ids


@pytest.mark.parametrize("version", [NONE, SPECIAL])
@pytest.mark.parametrize("broken_after", [0, 3])
def test_text_that_cannot_be_made_ends_its_request_and_no_other(
    tiny: Target, monkeypatch: pytest.MonkeyPatch, version: int, broken_after: int
) -> None:
    known = alone(tiny, request("x", PROMPT)).payload.output_ids
    extra = {SPECIAL: oracle({tuple(PROMPT): known})}
    engine, broken = engine_of(tiny, extra), tiny.tokenizer.detokenizer()
    pushed = list[int]()

    def push(token: int) -> str:
        if len(pushed) == broken_after:
            raise RuntimeError("no such text")
        pushed.append(token)
        return "."

    monkeypatch.setattr(broken, "push", push)
    with monkeypatch.context() as patch:
        patch.setattr(tiny.tokenizer, "detokenizer", lambda: broken)
        engine.add(request("a", PROMPT, version))
    for name in "bc":
        engine.add(request(name, PROMPT, version))
    results = run(engine)
    assert [results[name].status for name in "abc"] == [Status.ERROR, Status.OK, Status.OK]
    assert results["a"].error == "RuntimeError: no such text"
    assert results["b"].payload.output_ids == results["c"].payload.output_ids == known
    assert engine.stats()["step_errors"] == 0


def test_the_failed_requests_say_why(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(tiny)
    engine.add(request("a", PROMPT))
    monkeypatch.setattr(tiny.model, "logits", fail)
    (output,) = engine.step()
    assert output.result is not None
    assert (output.result.status, output.finish_reason) == (Status.ERROR, FinishReason.ERROR)
    assert output.result.error is not None
    assert not engine.has_work


def test_what_cannot_run_is_refused_before_it_is_queued(tiny: Target) -> None:
    engine = engine_of(tiny, max_queue=1)
    with pytest.raises(RequestTooLong):
        engine.add(request("x", PROMPT, max_tokens=1_000))
    with pytest.raises(InvalidRequest, match="vocabulary"):
        engine.add(request("x", [10**6]))
    for sampling in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}):
        with pytest.raises(InvalidRequest):
            engine.add(request("x", PROMPT, **sampling))
    engine.add(request("x", PROMPT))
    with pytest.raises(InvalidRequest, match="already"):
        engine.add(request("x", PROMPT))
    with pytest.raises(QueueFull):
        engine.add(request("y", PROMPT, traffic_class="refused"))
    assert [name for _, name, _ in engine.control._acceptance] == ["chat"]
    engine.check_integrity()
    stats = engine.stats()
    assert (stats["running"], stats["waiting"], stats["draft_errors"], stats["step_errors"]) == (0, 1, 0, 0)


def test_a_steps_record_is_what_was_proposed_and_kept(tiny: Target) -> None:
    plain = alone(tiny, request("x", PROMPT, max_tokens=8)).payload.output_ids
    wrong = (plain[3] + 1) % tiny.config.vocab_size
    script = {1: [plain[1], plain[2], wrong]}  # two right, one wrong, in the first step

    def think(tokens: list[int], k: int) -> list[int]:
        return script.get(len(tokens) - len(PROMPT), [])

    result = alone(tiny, request("x", PROMPT, SPECIAL, max_tokens=8), {SPECIAL: Scripted(think)})
    assert result.payload.steps[0] == VerifyStep((plain[1], plain[2], wrong), accepted=2, emitted=3)
    assert result.counts.accepted_per_pos == [1, 1, 0]
    assert result.payload.output_ids == plain


def test_step_costs_have_one_number_per_row_count(tiny: Target) -> None:
    costs = profile_step_costs(engine_of(tiny).runner, rows=(1, 3), context=16, repeats=2)
    assert costs.keys() == {1, 3}
    assert min(costs.values()) > 0


def test_the_profile_of_a_slow_target_ends_in_time(tiny: Target) -> None:
    passes = 0

    def clock() -> float:
        nonlocal passes
        passes += 1
        return float(passes)  # each look takes a second, so each pass at least one

    runner = engine_of(tiny, clock=clock).runner
    rows, passes = (4, 1, 2, 8, 3), 0
    costs = profile_step_costs(runner, rows, context=16, repeats=4, budget_s=18.0)
    assert passes <= 18 + 4, "no pass may begin after the budget"
    assert list(costs) == [1, 2, 4], "what there is no time to look at twice is left out, in the order given"
    assert list(profile_step_costs(runner, rows, context=16, budget_s=0.0)) == [1, 4], (
        "one count would say rows are free"
    )


def test_a_profile_is_the_least_of_its_passes_and_never_falls(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: passes of which something else makes most slower, and a count that comes out cheaper than a smaller."""
    runner, now, slow = engine_of(tiny).runner, [0.0], itertools.cycle([3.0, 2.0, 1.0, 4.0, 2.5])
    takes = {1: 5.0, 8: 11.0, 12: 9.0, 16: 12.0}

    def one_pass(count: int) -> None:
        now[0] += takes[count] * 1e-3 * next(slow)

    monkeypatch.setattr(runner, "clock", lambda: now[0])
    monkeypatch.setattr(runner.target_pass, "trial", lambda context, most: one_pass)
    costs = profile_step_costs(runner, tuple(takes), repeats=9)
    assert costs == pytest.approx({1: 5.0, 8: 10.0, 12: 10.0, 16: 12.0})


class Unreadable:
    """A K that raises when it is read."""

    def __int__(self) -> int:
        raise RuntimeError("planted")


def test_a_policy_that_cannot_be_read_fails_its_own_request_before_it_is_queued(tiny: Target) -> None:
    """Its neighbours share no step with it, and nothing of it stays."""
    broken = Scripted(lambda tokens, k: [], num_speculative_tokens=Unreadable())  # type: ignore[arg-type]
    engine = engine_of(tiny, {7: broken})
    engine.add(request("good", (1, 2, 3), NGRAM))
    with pytest.raises(RuntimeError, match="planted"):
        engine.add(request("bad", (1, 2, 3), 7))
    engine.check_integrity()
    assert run(engine).keys() == {"good"}
