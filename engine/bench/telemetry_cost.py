"""What traces cost: one server under a steady load, its telemetry switched on and off every few seconds."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
import numpy as np

from engine.bench.blocks import Run, ratio_figure
from engine.bench.report import Figure
from engine.bench.rig import own_home, wait_until
from engine.bench.workload import Workload
from engine.contracts import SlipstreamError
from engine.model.loading import Target
from engine.ops import system
from engine.ops.supervisor import Say
from engine.server.main import EngineServer, ServerThread
from engine.settings import Settings

if TYPE_CHECKING:
    from engine.bench.peers import Server
    from engine.bench.serving import Options

TOKENS = (29, 31, 33, 35)
"""Of each client's requests. Few, so that there are many traces for them; not the same for all, or they would end
together and be written together."""
SETTLE_S = 0.25
"""Not counted after a switch, beside ``telemetry.batch_delay_s``: what was traced before is still written then."""
SLICE_S = 2.0
"""Short, so that what else the machine does hits both halves of a pair alike; some batches long."""
PAIRS = 40
POLL_S = 0.002
"""How closely the end of a step is looked for."""
STEP_S = 60.0
"""Without a step for so long, something is broken."""


def measure(
    settings: Settings,
    target: Target,
    work: Sequence[Workload],
    options: Options,
    rng: np.random.Generator,
    say: Say,
) -> list[Figure]:
    """``telemetry_cost``: the share of tokens per second that telemetry takes, 1 - on / off over paired slices."""
    from engine.bench.peers import Server

    texts = [text for workload in work for text in workload.texts]
    order, settle_s = random.Random(int(rng.integers(1 << 30))), SETTLE_S + settings.telemetry.batch_delay_s
    with own_home() as home:
        engine = settings.engine.model_copy(update={"port": 0})
        own = settings.model_copy(update={"home": home, "database_url": None, "engine": engine})
        thread = None
        try:
            own = own.model_copy(update={"database_url": system.start_database(own)})
            server = EngineServer(own, target)
            thread = ServerThread(server)
            thread.start()
            wait_until(lambda: server.not_ready() is None, "the engine is ready", 120.0, pause_s=0.1)
            client, pairs = Server(server.url), list[tuple[Run, Run]]()
            client.serve(texts[: len(TOKENS)], len(TOKENS), max(TOKENS))
            with steady_load(client, min(texts, key=len)):
                for number in range(1, PAIRS + 1):
                    on, off = pair(server, settle_s, order, time.perf_counter, time.sleep)
                    pairs.append((on, off))
                    rates = f"on {on.tokens / on.seconds:.1f}, off {off.tokens / off.seconds:.1f}"
                    say(f"telemetry {number}/{PAIRS}: tokens/s {rates}")
        finally:
            if thread is not None:
                thread.stop()
    kept = ratio_figure("", pairs, rng)
    return [Figure("telemetry_cost", 1 - kept.value, 1 - kept.high, 1 - kept.low, kept.n, "share")]


def pair(
    server: EngineServer,
    settle_s: float,
    order: random.Random,
    clock: Callable[[], float],
    wait: Callable[[float], None],
) -> tuple[Run, Run]:
    """A slice of time with telemetry and one without, in random order."""
    runs: dict[bool, Run] = {}
    for on in order.sample((True, False), 2):
        server.service.telemetry = on
        wait(settle_s)
        began, before = step_end(server, clock, wait)
        wait(SLICE_S)
        ended, after = step_end(server, clock, wait)
        runs[on] = Run(after - before, ended - began)
    server.service.telemetry = True
    return runs[True], runs[False]


def step_end(server: EngineServer, clock: Callable[[], float], wait: Callable[[float], None]) -> tuple[float, int]:
    """(the moment the next step puts tokens out, all tokens until then): a slice is whole steps."""
    tokens, began = server.engine.output_tokens, clock()
    while server.engine.output_tokens == tokens:
        if clock() - began > STEP_S:
            raise SlipstreamError(f"The engine put no token out for {STEP_S:.0f} s under a load that never ends.")
        wait(POLL_S)
    return clock(), server.engine.output_tokens


@contextmanager
def steady_load(client: Server, text: str) -> Iterator[None]:
    """Clients who ask the same again and again: what a slice holds does not depend on where it is cut.

    The failure of a client is raised in the end.
    """
    done, failures = threading.Event(), list[Exception]()

    def ask(tokens: int) -> None:
        try:
            with httpx.Client(timeout=60.0) as http:
                client.ask(http, text, tokens)
                while not done.is_set():
                    client.ask(http, text, tokens)
        except Exception as error:
            failures.append(error)

    clients = [threading.Thread(target=ask, args=(tokens,), daemon=True) for tokens in TOKENS]
    for one in clients:
        one.start()
    try:
        yield
    finally:
        done.set()
        for one in clients:
            one.join()
    if failures:
        raise failures[0]
