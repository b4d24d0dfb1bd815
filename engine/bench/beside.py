"""What 500 traces a second with their tokens cost an engine that serves beside them, on one machine and one Postgres.

Blocks with and without that load are paired, in random order within the pair, under the same clients.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from pathlib import Path
from uuid import UUID

import numpy as np

from engine.bench import ingest
from engine.bench.blocks import Run, ratio_figure
from engine.bench.report import Figure, Report, count_figure
from engine.bench.rig import Rig, rig
from engine.contracts import TraceRecord
from engine.demo import prompts
from engine.demo.traffic import Traffic, served_model
from engine.ops.supervisor import Say
from engine.settings import Settings, TelemetrySettings
from engine.store.repositories import audit
from engine.telemetry.spill import Spill
from engine.telemetry.writer import TraceWriter

CLIENTS = 4
TOKENS = 16
BLOCK_S = 10.0


def run(settings: Settings, rate: int, pairs: int, seed: int, say: Say) -> Report:
    """``beside_requests_ratio``: answered requests per second under the load over those without."""
    with rig(settings, say) as system, tempfile.TemporaryDirectory(prefix="slipstream-spill-") as folder:
        writer = TraceWriter(system.database, Spill(Path(folder), 10**9), TelemetrySettings())
        writer.start()
        traffic = Traffic(system.url, served_model(system.url), prompts.shipped(), CLIENTS, seed, max_tokens=TOKENS)
        traffic.start()
        try:
            return Report("beside", seed, _figures(system, writer, traffic, rate, pairs, seed, say))
        finally:
            traffic.stop()
            writer.close()


def _figures(
    system: Rig, writer: TraceWriter, traffic: Traffic, rate: int, pairs: int, seed: int, say: Say
) -> list[Figure]:
    order, rng = random.Random(seed), np.random.default_rng(seed)
    offered: list[UUID] = []
    blocks: list[tuple[Run, Run]] = []
    time.sleep(BLOCK_S)  # until the clients are under way
    for number in range(1, pairs + 1):
        runs = {on: _block(writer, traffic, rate * on, rng, offered) for on in order.sample((True, False), 2)}
        blocks.append((runs[True], runs[False]))
        say(f"{number}/{pairs}: {runs[True].tokens} requests with {rate} traces/s beside, {runs[False].tokens} without")
    writer.flush(120.0)
    with system.database.read() as session:
        lost = audit.missing(session, offered)
    spent = pairs * BLOCK_S
    per_s = len(offered) / spent
    return [
        ratio_figure("beside_requests_ratio", blocks, rng),
        Figure("beside_per_s", per_s, per_s, per_s, len(offered), "traces/s"),
        count_figure("beside_lost", lost, len(offered), "traces"),
        count_figure("beside_failed_requests", traffic.failed, traffic.sent, "requests"),
    ]


def _block(writer: TraceWriter, traffic: Traffic, rate: int, rng: np.random.Generator, offered: list[UUID]) -> Run:
    """What the clients are answered in one block; ``tokens`` counts requests, all of about the same length."""
    ended = threading.Event()

    def submit(record: TraceRecord) -> None:
        offered.append(record.trace_id)
        writer.submit(record)

    models = [ingest.record(rng, payload=True) for _ in range(200)]
    load = threading.Thread(target=ingest.pace, args=(submit, rate, lambda _: ended.is_set(), models, rng), daemon=True)
    began, before = time.perf_counter(), traffic.answered
    if rate:
        load.start()
    time.sleep(BLOCK_S)
    answered, took = traffic.answered - before, time.perf_counter() - began
    ended.set()
    if rate:
        load.join()
    return Run(answered, took)
