"""Conversations that the target writes itself, questions included: to train a static draft on before any traffic.

Given nothing but the opening of a user turn, a model tuned on conversations writes a question as it was tuned on them
(Magpie, Xu et al. 2024, arXiv 2406.08464). Then it is asked its own question and answers greedily: a draft is there to
say what the target would say.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.contracts import FinishReason, SamplingParams, SlipstreamError, Status
from engine.model.loading import Target
from engine.model.tokenizer import Tokenizer
from engine.runner.engine import Engine, EngineRequest
from engine.speculation.none import NoneProposer

QUESTION = SamplingParams(96, temperature=1.0, top_p=0.95)
ANSWER = SamplingParams(160)
CHARACTERS = range(9, 600)
"""Of a question that is kept: what is shorter asks nothing, what is longer rambles."""
TRIED = 1_000
"""Questions of which at least one must be of use."""
PLAIN = 0


@dataclass(frozen=True, slots=True)
class Written:
    """A conversation of two turns, and the seed that its question was drawn with."""

    prompt: str
    response: str
    response_token_ids: tuple[int, ...]
    seed: int


def sample_conversations(
    engine: Engine, tokenizer: Tokenizer, concurrency: int, seed: int, known: Collection[str] = ()
) -> Iterator[Written]:
    """Conversations without end, ``concurrency`` turns at a time; no question twice, and none that is ``known``.

    ``engine`` serves nobody else and has room for ``concurrency`` requests. SlipstreamError when none of TRIED
    questions was of use.
    """
    engine.load(PLAIN, NoneProposer())
    opening, seeds = tuple(tokenizer.open_user_turn()), itertools.count(seed)
    answering, seen = dict[str, tuple[str, int]](), set(known)
    in_flight = asked = 0
    while True:
        while in_flight < concurrency:
            number = next(seeds)
            engine.add(EngineRequest(f"question-{number}", opening, replace(QUESTION, seed=number), PLAIN))
            in_flight += 1
        for result in [output.result for output in engine.step() if output.result is not None]:
            in_flight -= 1
            if result.status is not Status.OK:
                raise SlipstreamError(f"The model failed at {result.request_id}: {result.error}")
            if result.request_id in answering:
                text, number = answering.pop(result.request_id)
                yield Written(text, result.text, result.payload.output_ids, number)
                continue
            asked += 1
            text, number = result.text.strip(), int(result.request_id.partition("-")[2])
            ids = _asked(tokenizer, text, result.finish_reason)
            if ids is not None and text not in seen and len(ids) + ANSWER.max_tokens <= engine.max_model_len:
                seen.add(text)
                answering[f"answer-{number}"] = text, number
                engine.add(EngineRequest(f"answer-{number}", ids, ANSWER, PLAIN))
                in_flight += 1
        if asked >= TRIED and seen <= set(known):
            raise SlipstreamError(
                f"Of {asked} questions that the model wrote none was of use: none ended by itself with "
                f"{CHARACTERS.start} to {CHARACTERS.stop - 1} characters. Is it tuned on conversations?"
            )


def write_conversations(
    target: Target, out: Path, count: int, concurrency: int, seed: int, excluded: Collection[str] = ()
) -> Iterator[int]:
    """Conversations are added to the JSONL ``out`` until it holds ``count``; after each, how many it holds.

    One that holds some is gone on with, after its last seed. ``excluded`` questions are left out.
    """
    there = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    opening = len(target.tokenizer.open_user_turn())
    longest = opening + 2 * QUESTION.max_tokens + ANSWER.max_tokens
    engine = Engine(target, max_num_seqs=concurrency, max_model_len=longest, max_queue=2 * concurrency)
    known = {*excluded, *(row["prompt"] for row in there)}
    begin = max([seed, *(row["seed"] + 1 for row in there)])
    written = sample_conversations(engine, target.tokenizer, concurrency, begin, known)
    with out.open("a") as file:
        for number, one in enumerate(itertools.islice(written, max(0, count - len(there))), len(there) + 1):
            file.write(json.dumps(asdict(one)) + "\n")
            file.flush()
            yield number


def _asked(tokenizer: Tokenizer, text: str, reason: FinishReason) -> tuple[int, ...] | None:
    """The prompt of a question that the model ended by itself and that is neither too short nor too long."""
    if reason is not FinishReason.STOP or len(text) not in CHARACTERS:
        return None
    return tuple(tokenizer.apply_chat_template([{"role": "user", "content": text}]))
