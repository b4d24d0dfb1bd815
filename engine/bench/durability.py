"""Killed under load: the trace writer, Postgres, and every process at once, again and again.

A trace is acknowledged when its batch is committed or synced to the spill folder (``TraceWriter``'s ``kept``). The
writing process notes its id in a file at that moment; a kill of processes takes nothing from a file that was written.
Afterwards each noted trace must be in the table, each once, and the rollups of every tier must sum to the raw traces.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from engine.bench import ingest
from engine.bench.report import Figure, Report, count_figure
from engine.bench.rig import own_home, wait_until
from engine.contracts import SlipstreamError, TraceRecord
from engine.ops import postgres, upkeep
from engine.ops.interruption import held
from engine.ops.supervisor import Say
from engine.settings import TelemetrySettings
from engine.store import migrate
from engine.store.database import Database
from engine.store.repositories import audit
from engine.telemetry.spill import Spill, SpillRoom
from engine.telemetry.writer import TraceWriter

KINDS = ("writer", "postgres", "everything")
SPILL_BYTES = 2_000_000_000
COMPACT_S = 0.2
"""Minutes that are not over are compacted too, all the time, so that kills meet a compaction."""
PATIENCE_S = 60.0


@dataclass(slots=True)
class Drill:
    """One data directory with its server, and the writing process that is killed."""

    home: Path
    url: str
    rate: int
    writer: Callable[..., TraceWriter]
    process: Any = None
    starts: int = 0
    killed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    @property
    def noted(self) -> int:
        log = self.home / "acknowledged"
        return log.stat().st_size // 16 if log.exists() else 0

    def load(self) -> None:
        """Start the writing process."""
        self.starts += 1
        with held():
            self.process = multiprocessing.get_context("spawn").Process(
                target=write_traces, args=(self.url, self.home, self.rate, self.starts, self.writer)
            )
            self.process.start()

    def more(self, count: int) -> None:
        """Wait until so many more traces are acknowledged."""
        goal = self.noted + count
        wait_until(lambda: self.noted >= goal, f"{count} more acknowledged traces", PATIENCE_S)

    def kill(self, kind: str, after: int) -> None:
        """Kill one kind of thing and bring it back; with Postgres away, only once so many traces were spilled."""
        if kind != "writer":
            postgres.kill(self.home)
        if kind != "postgres":
            self.process.kill()
            self.process.join()
        else:
            self.more(after)
        self.killed[kind] += 1
        if kind != "writer":
            postgres.start(self.home)
        if kind != "postgres":
            self.load()

    def settle(self) -> None:
        """Let the writing process write all it has, and end."""
        self.process.terminate()
        self.process.join(PATIENCE_S)
        if self.process.exitcode != 0:
            raise SlipstreamError(f"The writing process did not end well: exit code {self.process.exitcode}.")


def run(kills: int, rate: int, seed: int, say: Say, writer: Callable[..., TraceWriter] = TraceWriter) -> Report:
    """``kills`` kills, the kinds in turn, at ``rate`` traces per second with their tokens.

    Each comes when a random number of further traces, up to two seconds' worth, has been acknowledged.
    """
    rng = np.random.default_rng(seed)
    with _drill(rate, writer, say) as drill, ingest.compacting(drill.url, COMPACT_S, upkeep.CLOSED_AFTER):
        drill.load()
        for number in range(kills):
            drill.more(int(rng.integers(rate // 10, 2 * rate)))
            kind = KINDS[number % len(KINDS)]
            say(f"kill {number + 1}/{kills}: {kind}, {drill.noted:,} traces acknowledged so far")
            drill.kill(kind, int(rng.integers(rate // 10, rate)))
        drill.more(rate // 10)
        drill.settle()
        ids = _noted(drill.home)
        with Database(drill.url, application="slipstream bench").read() as session:
            return Report("durability", seed, _figures(session, ids, drill))


def write_traces(
    url: str, home: Path, rate: int, seed: int, writer: Callable[..., TraceWriter]
) -> None:  # a process of its own
    """Offer traces until SIGTERM, noting what is acknowledged; then write what is left. Is killed at any moment."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    room = SpillRoom(home / "spill", "replica-0")
    with (home / "acknowledged").open("ab", buffering=0) as log:

        def kept(records: Sequence[TraceRecord]) -> None:
            log.write(b"".join(record.trace_id.bytes for record in records))

        made = writer(
            Database(url, application="writer"), Spill(room.folder, SPILL_BYTES), TelemetrySettings(), kept=kept
        )
        made.start()
        rng = np.random.default_rng(seed)
        models = [ingest.record(rng, payload=True) for _ in range(500)]
        ingest.pace(made.submit, rate, lambda _: ended.is_set(), models, rng)
        if not made.flush(PATIENCE_S):
            raise SlipstreamError(f"the writer did not get through: {made.stats()}")
        made.close()


def _figures(session: Any, ids: Sequence[UUID], drill: Drill) -> list[Figure]:
    count = len(ids)
    return [
        count_figure("durability_missing", audit.missing(session, ids), count, "traces acknowledged"),
        count_figure("durability_twice", audit.doubled(session), count, "traces"),
        count_figure("durability_rollup_differences", audit.rollup_differences(session), count, "rows of rollups"),
        *(Figure(f"durability_killed_{kind}", n, n, n, n, "kills") for kind, n in drill.killed.items()),
    ]


def _noted(home: Path) -> list[UUID]:
    data = (home / "acknowledged").read_bytes()
    return [UUID(bytes=data[at : at + 16]) for at in range(0, len(data) - 15, 16)]


@contextmanager
def _drill(rate: int, writer: Callable[..., TraceWriter], say: Say) -> Iterator[Drill]:
    with own_home() as home:
        say("starting Postgres")
        url = postgres.start(home)
        migrate.upgrade(url)
        drill = Drill(home, url, rate, writer)
        try:
            yield drill
        finally:
            if drill.process is not None:
                drill.process.kill()
                drill.process.join()
