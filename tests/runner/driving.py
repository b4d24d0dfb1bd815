"""Driving an engine in tests: requests, proposers made for a purpose, and running to the end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from engine.contracts import ProposerKind, SamplingParams
from engine.model.loading import Target
from engine.runner.engine import Engine, EngineRequest, Output, RequestResult
from engine.speculation.acceptance import DEFAULT_CONTROL, ControlSettings
from engine.speculation.memory import TraceMemory, TraceMemoryProposer
from engine.speculation.ngram import NgramProposer
from engine.speculation.none import NoneProposer
from engine.speculation.proposer import Proposer
from tests.trace_memory import TraceMemoryBuilder

NONE, NGRAM, MEMORY = 1, 2, 3


class Ticks:
    """A clock that moves by one at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@dataclass
class Scripted:
    """Drafts what a function of the tokens so far says: oracles, fools and saboteurs."""

    think: object
    num_speculative_tokens: int = 4
    kind: ProposerKind = ProposerKind.NGRAM
    control: ControlSettings = DEFAULT_CONTROL
    confidence: Sequence[float] = ()
    tokens: list[int] = field(default_factory=list)

    def start(self, prompt_ids: Sequence[int], traffic_class: str) -> Scripted:
        return replace(self, tokens=list(prompt_ids))

    def propose(self, k: int) -> list[int]:
        return self.think(self.tokens, k)  # type: ignore[operator]

    def observe(self, tokens: Sequence[int]) -> None:
        self.tokens.extend(tokens)


def oracle(known: dict[tuple[int, ...], tuple[int, ...]]) -> Scripted:
    """Knows every response beforehand: prompt → output."""

    def think(tokens: list[int], k: int) -> list[int]:
        for prompt, output in known.items():
            if tuple(tokens[: len(prompt)]) == prompt:
                done = len(tokens) - len(prompt)
                return list(output[done : done + k])
        return []

    return Scripted(think)


def memory_of(results: Sequence[RequestResult], k: int = 4) -> TraceMemoryProposer:
    builder = TraceMemoryBuilder()
    for result in results:
        builder.add(result.traffic_class, result.payload.prompt_ids, result.payload.output_ids)
    return TraceMemoryProposer(k, TraceMemory.parse(builder.build(1_000_000)))


def engine_of(target: Target, extra: dict[int, Proposer] | None = None, **options: object) -> Engine:
    engine = Engine(target, **({"max_num_seqs": 4, "max_model_len": 160, "clock": Ticks()} | options))  # type: ignore[arg-type]
    engine.load(NONE, NoneProposer())
    engine.load(NGRAM, NgramProposer(4))
    for version, proposer in (extra or {}).items():
        engine.load(version, proposer)
    return engine


def request(
    name: str, prompt: Sequence[int], version: int = NONE, traffic_class: str = "chat", **sampling: object
) -> EngineRequest:
    params = SamplingParams(**({"max_tokens": 24, "ignore_eos": True} | sampling))  # type: ignore[arg-type]
    return EngineRequest(name, tuple(prompt), params, version, traffic_class)


def run(engine: Engine, before: Sequence[Output] = ()) -> dict[str, RequestResult]:
    """Step until nothing is left; what was streamed, ``before`` included, must be what the results say."""
    outputs = list(before)
    while engine.has_work:
        outputs += engine.step()
        engine.check_integrity()
    return results_of(outputs)


def run_at_random(
    engine: Engine, wanted: Sequence[EngineRequest], rng: random.Random
) -> tuple[dict[str, RequestResult], set[str]]:
    """Requests join at random moments and now and then one is cancelled; (results, who was cancelled)."""
    waiting, outputs, cancelled = list(wanted), list[Output](), set[str]()
    while waiting or engine.has_work:
        while waiting and rng.random() < 0.5:
            engine.add(waiting.pop())
        if rng.random() < 0.05 and engine.scheduler.running:
            name = rng.choice(list(engine.scheduler.running))
            cancelled.add(name)
            engine.cancel(name)
        outputs += engine.step()
        engine.check_integrity()
    results = {o.request_id: o.result for o in outputs if o.result is not None}
    assert results.keys() | cancelled == {w.request_id for w in wanted}
    return results, cancelled


def results_of(outputs: Sequence[Output]) -> dict[str, RequestResult]:
    results = {output.request_id: output.result for output in outputs if output.result is not None}
    for name, result in results.items():
        own = [output for output in outputs if output.request_id == name]
        assert "".join(output.text for output in own) == result.text
        assert tuple(token for output in own for token in output.new_token_ids) == result.payload.output_ids
        assert [output.finished for output in own].index(True) == len(own) - 1
    return results


def plain_answers(target: Target, prompts: Sequence[list[int]], max_tokens: int) -> list[RequestResult]:
    """Of each prompt by plain decoding, alone."""
    return [alone(target, request(str(i), p, NONE, max_tokens=max_tokens)) for i, p in enumerate(prompts)]


def alone(target: Target, wanted: EngineRequest, extra: dict[int, Proposer] | None = None) -> RequestResult:
    engine = engine_of(target, extra)
    engine.add(wanted)
    return run(engine)[wanted.request_id]
