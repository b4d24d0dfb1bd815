"""Clients of an engine in this process: so many at a time, each asking for the next response when it has one.

What is measured has company. A block of sixteen prompts for sixteen clients, begun together, lasts as long as its
unluckiest request, and under plain decoding all of them are equally lucky: a policy that serves most requests faster
would be charged for the emptier and emptier passes that end the block, which a server under load never sees. So the
other clients are in the midst of something when the first request begins, each at another point of it, and go on until
the last one has ended.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from engine.bench.blocks import Run
from engine.bench.workload import Ids
from engine.contracts import SlipstreamError
from engine.runner.request import RequestResult

if TYPE_CHECKING:
    from engine.runner.engine import Engine, EngineRequest

Ask = Callable[[str, Ids, int], "EngineRequest"]
"""(request id, prompt, most tokens) → request."""


def serve(
    engine: Engine,
    ask: Ask,
    prompts: Sequence[Ids],
    concurrency: int,
    tokens: int,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = time.process_time,
) -> Run:
    """Serve ``prompts`` to ``concurrency`` clients, at most ``tokens`` each, on an engine that does nothing else.

    The run counts every token that is put out from the beginning of the first prompt to the end of the last, the
    company's too; its results are those of ``prompts``. A single client (``concurrency`` 1) has no company.
    """
    clients, company = _Clients(engine, ask), cycle(prompts)
    for client in range(1, concurrency):
        clients.begin(next(company), max(1, tokens * client // concurrency))
    while clients.silent:  # the prompts of the company are computed before the clock starts
        clients.step()
    waiting, measured, results, made = deque(prompts), set[str](), list[RequestResult](), 0
    began, cpu = clock(), cpu_clock()
    while waiting or measured:
        while len(clients.running) < concurrency:
            if waiting:
                measured.add(clients.begin(waiting.popleft(), tokens))
            else:
                clients.begin(next(company), tokens)
        emitted, ended = clients.step()
        made += emitted
        results += [result for result in ended if result.request_id in measured]
        measured.difference_update(result.request_id for result in ended)
    run = Run(made, clock() - began, cpu_clock() - cpu, tuple(results))
    for request_id in clients.running:
        engine.cancel(request_id)
    return run


class _Clients:
    """Requests under way: ``running``, and which of them are ``silent``, without a token yet."""

    def __init__(self, engine: Engine, ask: Ask) -> None:
        self.engine, self.ask = engine, ask
        self.running, self.silent = set[str](), set[str]()
        self.begun = 0

    def begin(self, prompt: Ids, most: int) -> str:
        """Ask for at most so many tokens; the request's id."""
        self.begun += 1
        request = self.ask(f"bench-{self.begun}", prompt, most)
        self.engine.add(request)
        self.running.add(request.request_id)
        self.silent.add(request.request_id)
        return request.request_id

    def step(self) -> tuple[int, list[RequestResult]]:
        """(tokens put out, requests that ended)"""
        made, ended = 0, list[RequestResult]()
        for output in self.engine.step():
            made += len(output.new_token_ids)
            if output.new_token_ids or output.finished:
                self.silent.discard(output.request_id)
            if (result := output.result) is not None:
                if result.error:
                    raise SlipstreamError(f"Request {output.request_id} failed: {result.error}")
                self.running.discard(output.request_id)
                ended.append(result)
        return made, ended
