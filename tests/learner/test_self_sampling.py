"""Conversations that the target writes itself: its own questions, its own greedy answers, and never the same twice."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.contracts import SamplingParams, SlipstreamError
from engine.learner import self_sampling
from engine.learner.self_sampling import Written, sample_conversations, write_conversations
from engine.learner.static import read_conversations
from engine.model.loading import Target
from engine.runner.engine import Engine, EngineRequest
from tests.runner.driving import NONE, alone, request


@pytest.fixture(autouse=True)
def short(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns that end: one token in ten says so, where the tiny model's own end would come once in three hundred."""
    monkeypatch.setattr(tiny.tokenizer, "eos_ids", frozenset(range(2, 34)))
    monkeypatch.setattr(self_sampling, "QUESTION", SamplingParams(30, temperature=1.0, top_p=0.95))
    monkeypatch.setattr(self_sampling, "ANSWER", SamplingParams(12))
    monkeypatch.setattr(self_sampling, "CHARACTERS", range(1, 200))


def engine_of(tiny: Target, concurrency: int) -> Engine:
    return Engine(tiny, max_num_seqs=concurrency, max_model_len=300, max_queue=2 * concurrency)


def sampled(tiny: Target, count: int, concurrency: int = 4, **more: object) -> list[Written]:
    found = sample_conversations(engine_of(tiny, concurrency), tiny.tokenizer, concurrency, 0, **more)  # type: ignore[arg-type]
    return list(itertools.islice(found, count))


def test_a_user_turn_opens_as_the_template_opens_it(tiny: Target) -> None:
    opening = tiny.tokenizer.open_user_turn()
    assert tiny.tokenizer.apply_chat_template([{"role": "user", "content": "in the end"}])[: len(opening)] == opening
    assert tiny.tokenizer.backend.decode(opening, skip_special_tokens=False) == "<|im_start|>user\n"


def test_it_asks_and_answers_itself(tiny: Target) -> None:
    """Each conversation again, alone: the question from its seed, the answer greedily, whoever shared the batch."""
    opening = tuple(tiny.tokenizer.open_user_turn())
    for one in sampled(tiny, 5):
        asked = EngineRequest("q", opening, replace(self_sampling.QUESTION, seed=one.seed), NONE)
        assert alone(tiny, asked).text.strip() == one.prompt
        ids = tiny.tokenizer.apply_chat_template([{"role": "user", "content": one.prompt}])
        answer = alone(tiny, request("a", tuple(ids), NONE, max_tokens=12, ignore_eos=False))
        assert (answer.payload.output_ids, answer.text) == (one.response_token_ids, one.response)


def test_no_question_comes_twice(tiny: Target) -> None:
    first = sampled(tiny, 5)
    known = {first[0].prompt, first[2].prompt}
    later = sampled(tiny, 5, known=known)
    assert known.isdisjoint(one.prompt for one in later)
    assert len({one.prompt for one in first}) == 5


def test_a_file_is_gone_on_with(tiny: Target, tmp_path: Path) -> None:
    out = tmp_path / "chats.jsonl"
    assert list(write_conversations(tiny, out, 3, 4, 0)) == [1, 2, 3]
    assert list(write_conversations(tiny, out, 5, 4, 0, {"never"})) == [4, 5]
    assert list(write_conversations(tiny, out, 5, 4, 0)) == []
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len({row["seed"] for row in rows}) == 5
    assert min(row["seed"] for row in rows[3:]) > max(row["seed"] for row in rows[:3])
    assert len(read_conversations(out, tiny)) >= 4  # a response of one token teaches nothing


def test_a_model_that_ends_no_turn_is_refused(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_sampling, "QUESTION", SamplingParams(2, temperature=1.0))
    monkeypatch.setattr(self_sampling, "CHARACTERS", range(100, 200))
    monkeypatch.setattr(self_sampling, "TRIED", 20)
    with pytest.raises(SlipstreamError, match="tuned on conversations"):
        sampled(tiny, 1)
