"""Clients of an engine that takes as many steps for a request as the test says."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.bench.blocks import Run
from engine.bench.clients import serve
from engine.bench.workload import Ids
from engine.contracts import SlipstreamError
from engine.runner.engine import Engine, EngineRequest
from engine.runner.request import Output

TOKENS = 100
CLIENTS = 8
PROMPTS: list[Ids] = [(n,) for n in range(CLIENTS)]


class StandIn:
    """A step takes a second, however many requests share it; a request gets ``per_step`` [prompt's first id] tokens of
    it, the first of them in the step after its prompt's."""

    def __init__(self, per_step: Sequence[int], error: str | None = None) -> None:
        self.per_step, self.error = per_step, error
        self.now, self.most_at_once, self.cancelled = 0.0, 0, 0
        self.left: dict[str, list[int]] = {}  # request → its prompt, tokens still to come, whether its prompt is done

    def add(self, request: Any) -> None:
        self.left[request.request_id] = [request.prompt_ids[0], request.sampling, 0]

    def cancel(self, request_id: str) -> None:
        del self.left[request_id]
        self.cancelled += 1

    def step(self) -> list[Output]:
        self.now += 1
        self.most_at_once = max(self.most_at_once, len(self.left))
        outputs = []
        for request_id, one in list(self.left.items()):
            count = min(self.per_step[one[0]], one[1]) if one[2] else 1
            one[1], one[2] = one[1] - count, 1
            result: Any = None
            if not one[1]:
                del self.left[request_id]
                result = SimpleNamespace(request_id=request_id, error=self.error, prompt=one[0])
            outputs.append(Output(request_id, (0,) * count, "", result is not None, None, result))
        return outputs


def ask(request_id: str, ids: Ids, most: int) -> EngineRequest:
    return cast(EngineRequest, SimpleNamespace(request_id=request_id, prompt_ids=ids, sampling=most))


def run(engine: StandIn, clients: int = CLIENTS) -> Run:
    clock = lambda: engine.now  # noqa: E731
    return serve(cast(Engine, engine), ask, PROMPTS, clients, TOKENS, clock, clock)


def rate(one: Run) -> float:
    return one.tokens / one.seconds


def test_one_unlucky_request_is_not_what_a_block_lasts_for() -> None:
    """All but one get three tokens a step; begun together and alone they would end when that one does."""
    slow, uneven = [1] * CLIENTS, [1] + [3] * (CLIENTS - 1)
    steps = [TOKENS] + [1 + 33] * (CLIENTS - 1)  # of each prompt
    steady = TOKENS * len(steps) / sum(steps)
    assert rate(run(StandIn(uneven))) / rate(run(StandIn(slow))) == pytest.approx(steady, rel=0.12)
    assert steady > 2.2
    assert block_alone(StandIn(uneven)) == block_alone(StandIn(slow))  # what blocks without company would tell


def block_alone(engine: StandIn) -> float:
    for number, ids in enumerate(PROMPTS):
        engine.add(ask(str(number), ids, TOKENS))
    while engine.left:
        engine.step()
    return engine.now


def test_no_client_is_ever_idle_and_the_company_ends_with_the_block() -> None:
    engine = StandIn([1, 2, 3, 4] * 2)
    one = run(engine)
    assert sorted(result.prompt for result in one.results) == list(range(CLIENTS))  # type: ignore[attr-defined]
    assert engine.most_at_once == CLIENTS
    assert not engine.left
    assert 0 < engine.cancelled < CLIENTS


def test_a_single_client_has_no_company() -> None:
    engine = StandIn([1] * CLIENTS)
    one = run(engine, 1)
    assert (one.tokens, one.seconds) == (CLIENTS * TOKENS, CLIENTS * TOKENS)
    assert engine.most_at_once == 1
    assert engine.cancelled == 0


def test_a_request_that_fails_is_said() -> None:
    with pytest.raises(SlipstreamError, match="no more memory"):
        run(StandIn([1] * CLIENTS, "no more memory"))
