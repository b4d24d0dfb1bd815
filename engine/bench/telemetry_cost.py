"""What traces cost: a server with its writer, Postgres and metrics on and off, block by block."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

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
    from engine.bench.serving import Options

CLIENTS = 4
BLOCK = 24
"""Requests of a block: few tokens each, so that there are many traces for their tokens; enough of them that what is
written after the last one, outside of its clock, is little of the whole."""
PAIRS = 16
TOKENS = 32
DRAIN_S = 30.0


def measure(
    settings: Settings,
    target: Target,
    work: Sequence[Workload],
    options: Options,
    rng: np.random.Generator,
    say: Say,
) -> list[Figure]:
    """``telemetry_cost``: the share of tokens per second that telemetry takes, 1 - on / off over paired blocks."""
    from engine.bench.peers import Server

    texts = [text for workload in work for text in workload.texts]
    order = random.Random(int(rng.integers(1 << 30)))
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

            def serve(part: Sequence[str]) -> Run:
                return client.serve(part, CLIENTS, TOKENS)

            serve(order.sample(texts, min(BLOCK, len(texts))))
            for number in range(1, PAIRS + 1):
                on, off = pair(server, order.choices(texts, k=BLOCK), serve, order)
                pairs.append((on, off))
                rates = f"on {on.tokens / on.seconds:.1f}, off {off.tokens / off.seconds:.1f}"
                say(f"telemetry {number}/{PAIRS}: tokens/s {rates}")
        finally:
            if thread is not None:
                thread.stop()
    kept = ratio_figure("", pairs, rng)
    return [Figure("telemetry_cost", 1 - kept.value, 1 - kept.high, 1 - kept.low, kept.n, "share")]


def pair(
    server: EngineServer, part: Sequence[str], serve: Callable[[Sequence[str]], Run], order: random.Random
) -> tuple[Run, Run]:
    """``part`` served with telemetry and without, in random order.

    Before either begins, the traces of what was served before are written: a block without telemetry must not pay for
    those of its predecessor.
    """
    runs: dict[bool, Run] = {}
    for on in order.sample((True, False), 2):
        if not server.writer.flush(DRAIN_S):
            raise SlipstreamError(f"Traces were not written within {DRAIN_S:.0f} s: {server.writer.stats()}")
        server.service.telemetry = on
        runs[on] = serve(part)
    return runs[True], runs[False]
