"""How many traces per second the writer takes without losing one, and how soon a panel shows a trace."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import numpy as np

from engine.bench.report import Figure, count_figure, quantile_figure
from engine.contracts import Status, TraceRecord
from engine.ops.supervisor import Say
from engine.settings import TelemetrySettings
from engine.store.database import Database
from engine.store.panels import PANELS
from engine.store.repositories import audit
from engine.store.repositories.overview import Slice
from engine.telemetry.spill import Spill
from engine.telemetry.writer import TraceWriter

PROBES = 60
CLASSES = ("chat", "code", "long_form", "batch")


def measure(database: Database, rate: int, seconds: float, rng: np.random.Generator, say: Say) -> list[Figure]:
    """Offers ``rate`` traces per second for so long; then asks how soon a single one is seen."""
    with tempfile.TemporaryDirectory(prefix="slipstream-spill-") as folder:
        writer = TraceWriter(database, Spill(Path(folder), 10**9), TelemetrySettings())
        with database.read() as session:
            before = audit.traces(session)
        writer.start()
        offered, took = _offer(writer, rate, seconds, rng)
        writer.flush(120.0)
        drained = time.perf_counter()
        with database.read() as session:
            stored = audit.traces(session) - before
        say(f"offered {offered:,} in {took:.1f} s; the writer says {writer.stats()}")
        seen = [_visible_after(database, writer, number, rng) for number in range(PROBES)]
        writer.close()
    per_s = stored / max(took, 1e-9)
    say(f"drained {time.perf_counter() - drained:.1f} s after the last")
    return [
        Figure("ingest_per_s", per_s, per_s, per_s, stored, "traces/s"),
        count_figure("ingest_lost", offered - stored, offered, "traces"),
        quantile_figure("visible_after_s_p95", seen, 0.95, "s, submit to the panel's query", rng),
    ]


def _offer(writer: TraceWriter, rate: int, seconds: float, rng: np.random.Generator) -> tuple[int, float]:
    """Submit at an even pace, in slices of 10 ms; how many, and the seconds from the first until all are written."""
    models = [record(rng) for _ in range(2_000)]
    began, sent = time.perf_counter(), 0
    while (now := time.perf_counter() - began) < seconds:
        while sent < now * rate:
            one = models[sent % len(models)]
            fresh = UUID(int=int.from_bytes(rng.bytes(16), "big"), version=4)
            writer.submit(replace(one, trace_id=fresh, started_at=datetime.now(UTC)))
            sent += 1
        time.sleep(0.01)
    writer.flush(120.0)
    return sent, time.perf_counter() - began


def _visible_after(database: Database, writer: TraceWriter, number: int, rng: np.random.Generator) -> float:
    """Seconds from handing a trace to the writer until the overview's totals count it."""
    one = replace(record(rng), traffic_class=f"probe-{number}", started_at=datetime.now(UTC))
    part = Slice(one.started_at - timedelta(hours=1), one.started_at + timedelta(hours=1), one.traffic_class)
    began = time.perf_counter()
    writer.submit(one)
    while time.perf_counter() - began < 30.0:
        with database.read() as session:
            if PANELS["overview.totals"].read(session, part):
                break
        time.sleep(0.01)
    return time.perf_counter() - began


def record(rng: np.random.Generator) -> TraceRecord:
    """A plausible request without its tokens."""
    steps = int(rng.integers(8, 60))
    accepted = int(rng.integers(0, steps))
    ttft, decode = float(rng.lognormal(-2.5, 0.5)), steps * float(rng.lognormal(-3.7, 0.2))
    output = 1 + steps + accepted
    return TraceRecord(
        trace_id=UUID(int=int.from_bytes(rng.bytes(16), "big"), version=4),
        request_id="bench",
        replica_id="replica-0",
        started_at=datetime.now(UTC),
        policy_version=int(rng.integers(2, 4)),
        arm="champion",
        generation=1,
        traffic_class=str(rng.choice(CLASSES)),
        status=Status.OK,
        model="seeded",
        endpoint="/v1/chat/completions",
        assignment_key=f"c{int(rng.integers(1000))}",
        finish_reason="stop",
        max_tokens=256,
        queue_s=0.002,
        ttft_s=ttft,
        tpot_s=decode / (output - 1),
        e2e_s=ttft + decode,
        prompt_tokens=int(rng.integers(10, 800)),
        output_tokens=output,
        steps=steps,
        drafted=4 * steps,
        accepted=accepted,
        drafted_per_pos=(steps,) * 4,
        accepted_per_pos=(accepted, 0, 0, 0),
        draft_s=0.05 * decode,
        verify_s=0.9 * decode,
    )
