"""What 500 traces a second with their tokens cost an engine that serves beside them, on one machine and one Postgres.

Three kinds of blocks take turns in random order, under the same clients: nothing beside; records made at that rate and
thrown away, which is what the load itself takes of the processor; records made and written, with the compactor at work
on them at once: such a block ends when all of its own is written and compacted. Written over made is what the store
costs, written over nothing is the bound for who makes them here.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import numpy as np

from engine.bench import ingest
from engine.bench.blocks import Run, ratio_figure
from engine.bench.report import Figure, Report, count_figure
from engine.bench.rig import rig
from engine.contracts import SlipstreamError, TraceRecord
from engine.demo import prompts
from engine.demo.traffic import Traffic, served_model
from engine.ops import upkeep
from engine.ops.supervisor import Say
from engine.settings import Settings, TelemetrySettings
from engine.store.database import Database
from engine.store.repositories import audit, rollups
from engine.telemetry.spill import Spill
from engine.telemetry.writer import TraceWriter

NOTHING, MADE, WRITTEN = "nothing", "made", "written"
CLIENTS = 4
TOKENS = 16
BLOCK_S = 6.0
COMPACT_S = 2.0
"""Minutes that are not over are compacted too."""
DRAIN_S = 60.0


def run(settings: Settings, rate: int, rounds: int, seed: int, say: Say) -> Report:
    """``beside_ratio_…``: answered requests per second over those of the other blocks of the same round."""
    rng = np.random.default_rng(seed)
    with rig(settings, say) as system, tempfile.TemporaryDirectory(prefix="slipstream-spill-") as folder:
        writer = TraceWriter(system.database, Spill(Path(folder), 10**9), TelemetrySettings())
        writer.start()
        traffic = Traffic(system.url, served_model(system.url), prompts.shipped(), CLIENTS, seed, max_tokens=TOKENS)
        traffic.start()
        try:
            time.sleep(BLOCK_S)  # until the clients are under way
            load = Load(system.database, writer, rate, rng)
            with ingest.compacting(system.database.url, COMPACT_S, upkeep.CLOSED_AFTER):
                blocks = alternate(load, lambda: traffic.answered, rounds, random.Random(seed), say)
            figures = load_figures(system.database, load)
        finally:
            traffic.stop()
            writer.close()
        say(f"the writer says {writer.stats()}")
        failed = count_figure("beside_failed_requests", traffic.failed, traffic.sent, "requests")
    return Report("beside", seed, [*ratios(blocks, rng), *figures, failed])


@dataclass(slots=True)
class Load:
    """Traces at an even pace, ``rate`` a second; ``offered`` are those the writer was given, in ``offered_s``."""

    database: Database
    writer: TraceWriter
    rate: int
    rng: np.random.Generator
    offered: list[UUID] = field(default_factory=list)
    offered_s: float = 0.0
    _models: Sequence[TraceRecord] = ()

    def __post_init__(self) -> None:
        self._models = [ingest.record(self.rng, payload=True) for _ in range(200)]

    def beside(self, kind: str, work: Callable[[], None]) -> None:
        """Do ``work`` with such a block's load beside it; over when what was offered is written and compacted."""
        if kind == NOTHING:
            return work()
        ended, began = threading.Event(), time.perf_counter()
        submit = self._submit if kind == WRITTEN else _throw_away
        arguments = (submit, self.rate, lambda _: ended.is_set(), self._models, self.rng)
        load = threading.Thread(target=ingest.pace, args=arguments, daemon=True)
        load.start()
        try:
            work()
        finally:
            ended.set()
            load.join()
        if kind == WRITTEN:
            self.offered_s += time.perf_counter() - began
            self._drain()
        return None

    def _drain(self) -> None:
        """Until nothing of it is left to do: the next block must not pay for it."""
        until = time.perf_counter() + DRAIN_S
        if not self.writer.flush(DRAIN_S):
            raise SlipstreamError(f"Traces were not written within {DRAIN_S:.0f} s: {self.writer.stats()}")
        while self._waiting():
            if time.perf_counter() > until:
                raise SlipstreamError(f"Traces were not compacted within {DRAIN_S:.0f} s.")
            upkeep.compact(self.database, datetime.now(UTC) + upkeep.CLOSED_AFTER)

    def _waiting(self) -> int:
        with self.database.read() as session:
            return rollups.freshness(session).waiting

    def _submit(self, record: TraceRecord) -> None:
        self.offered.append(record.trace_id)
        self.writer.submit(record)


def alternate(
    load: Load,
    answered: Callable[[], int],
    rounds: int,
    order: random.Random,
    say: Say,
    wait: Callable[[float], None] = time.sleep,
) -> list[dict[str, Run]]:
    """One block of each kind a round; ``tokens`` of a run counts requests, all of about the same length."""
    found = []
    for number in range(1, rounds + 1):
        runs: dict[str, Run] = {}
        for kind in order.sample((NOTHING, MADE, WRITTEN), 3):
            began, before = time.perf_counter(), answered()
            load.beside(kind, lambda: wait(BLOCK_S))
            runs[kind] = Run(answered() - before, time.perf_counter() - began)
        found.append(runs)
        said = ", ".join(f"{runs[kind].tokens} {kind}" for kind in (NOTHING, MADE, WRITTEN))
        say(f"{number}/{rounds}: requests answered with traces {said}")
    return found


def ratios(blocks: Sequence[dict[str, Run]], rng: np.random.Generator) -> list[Figure]:
    return [
        ratio_figure(f"beside_ratio_written_{other}", [(runs[WRITTEN], runs[other]) for runs in blocks], rng)
        for other in (MADE, NOTHING)
    ]


def load_figures(database: Database, load: Load) -> list[Figure]:
    """How many a second were offered, and which of them are not in the table."""
    with database.read() as session:
        lost = audit.missing(session, load.offered)
    per_s = len(load.offered) / max(load.offered_s, 1e-9)
    return [
        Figure("beside_per_s", per_s, per_s, per_s, len(load.offered), "traces/s"),
        count_figure("beside_lost", lost, len(load.offered), "traces"),
    ]


def _throw_away(record: TraceRecord) -> None:
    """What the load itself costs."""
