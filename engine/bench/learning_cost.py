"""What learning costs those who are being served: a real engine under load, a real learner beside it, on and off.

The same prompts are sent in every block, one block with the learner at work and one with it stopped, in random order
within each pair, so that what the machine does meanwhile is the same for both.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import psutil

from engine.bench import paired
from engine.bench.report import Figure, Report
from engine.bench.rig import Rig, rig, wait_until
from engine.contracts import SlipstreamError
from engine.demo import prompts
from engine.demo.prompts import Prompt
from engine.demo.traffic import served_model
from engine.ops import system
from engine.ops.supervisor import Say
from engine.settings import Settings
from engine.store.repositories import learning

EVERY = 16
"""A candidate after so few requests: the learner is due in every block, far more often than by default."""


@dataclass(frozen=True, slots=True)
class Options:
    """``pairs`` of blocks of ``requests`` each, ``clients`` at a time, ``tokens`` of output at most."""

    pairs: int = 10
    requests: int = 24
    clients: int = 2
    tokens: int = 24
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """Seconds of each request, and CPU seconds of the learner meanwhile."""

    latencies: Sequence[float]
    learner_s: float
    took_s: float


def run(settings: Settings, options: Options, say: Say) -> Report:
    wanted = settings.learner.model_copy(
        update={"every_requests": EVERY, "min_requests": EVERY, "auto_rollout": False, "poll_s": 0.5}
    )
    rng = random.Random(options.seed)
    with rig(settings.model_copy(update={"learner": wanted}), say) as running:
        shipped = [p for found in prompts.shipped().values() for p in found]
        sent = rng.sample(shipped, min(options.requests, len(shipped)))
        model = served_model(running.url)
        with ThreadPoolExecutor(options.clients) as pool:
            paired.serve(pool, running.url, model, shipped[: 4 * EVERY], options.tokens)  # something to learn from
            running.supervisor.start(system.learner_component(running.settings))
            learner = psutil.Process(running.supervisor.pid("learner"))
            try:
                wait_until(lambda: _attempts(running) > 0, "the learner's first attempt", 180.0, pause_s=0.5)
                blocks = [_pair(pool, running, model, sent, learner, options, rng) for _ in range(options.pairs)]
            finally:
                _signal(learner, signal.SIGCONT)  # a stopped process does not hear that it shall end
        made = _attempts(running)
    if not any(with_learner.learner_s for with_learner, _ in blocks):
        raise SlipstreamError("The learner did nothing in any block, so the run shows nothing.")
    return Report("learning-cost", options.seed, _figures(blocks, made, options.seed))


def _pair(
    pool: ThreadPoolExecutor, running: Rig, model: str, sent: Sequence[Prompt], learner: psutil.Process,
    options: Options, rng: random.Random,
) -> tuple[Block, Block]:  # fmt: skip
    """(with the learner, without it)."""
    found: dict[bool, Block] = {}
    for working in rng.sample([True, False], 2):
        _signal(learner, signal.SIGCONT if working else signal.SIGSTOP)
        before, began = _cpu_s(learner), time.perf_counter()
        latencies = paired.serve(pool, running.url, model, sent, options.tokens)
        found[working] = Block(latencies, _cpu_s(learner) - before, time.perf_counter() - began)
    return found[True], found[False]


def _attempts(running: Rig) -> int:
    with running.database.read() as session:
        return len(learning.attempts(session, limit=10_000))


def _cpu_s(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


def _signal(process: psutil.Process, what: signal.Signals) -> None:
    os.kill(process.pid, what)


def _figures(blocks: Sequence[tuple[Block, Block]], attempts: int, seed: int) -> list[Figure]:
    """Ratios of quantiles over all requests; intervals resample pairs of blocks."""
    rng = np.random.default_rng(seed)
    latencies = [(working.latencies, idle.latencies) for working, idle in blocks]
    found = paired.ratios("learning/idle", latencies, (0.95, 0.5), rng)
    found.append(paired.share("learner_cores", [(block.learner_s, block.took_s) for block, _ in blocks], "cores", rng))
    stopped = sum(block.learner_s for _, block in blocks)
    found.append(Figure("learner_cpu_s_while_stopped", stopped, stopped, stopped, len(blocks), "s"))
    found.append(Figure("attempts", float(attempts), float(attempts), float(attempts), attempts, "attempts"))
    return found
