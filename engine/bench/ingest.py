"""How many traces per second the writer takes without losing one, and how soon a panel shows a trace."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from engine.bench.report import Figure, count_figure, quantile_figure
from engine.contracts import Status, TracePayload, TraceRecord, VerifyStep
from engine.ops import upkeep
from engine.ops.supervisor import Say
from engine.settings import TelemetrySettings
from engine.store.database import Database
from engine.store.panels import PANELS
from engine.store.repositories import audit
from engine.store.repositories.overview import Slice
from engine.telemetry.spill import Spill
from engine.telemetry.writer import TraceWriter

PROBES = 60
PROBE = "probe"
"""A class of its own: no other request is taken for the one that is waited for."""
COMPACT_S = 15.0
CLASSES = ("chat", "code", "long_form", "batch")


def measure(database: Database, rate: int, seconds: float, rng: np.random.Generator, say: Say) -> list[Figure]:
    """Offers ``rate`` traces per second for so long; then asks how soon a single one is seen."""
    with tempfile.TemporaryDirectory(prefix="slipstream-spill-") as folder:
        writer = TraceWriter(database, Spill(Path(folder), 10**9), TelemetrySettings())
        with database.read() as session:
            before = audit.traces(session)
        writer.start()
        with compacting(database.url, COMPACT_S):
            offered, took = _offer(writer, rate, seconds, rng)
        with database.read() as session:
            stored = audit.traces(session) - before
        say(f"offered {offered:,}, written {took:.1f} s after the first; the writer says {writer.stats()}")
        seen = [_visible_after(database, writer, rng) for _ in range(PROBES)]
        writer.close()
    per_s = stored / max(took, 1e-9)
    return [
        Figure("ingest_per_s", per_s, per_s, per_s, stored, "traces/s"),
        count_figure("ingest_lost", offered - stored, offered, "traces"),
        quantile_figure("visible_after_s_p95", seen, 0.95, "s, submit to the panel's query", rng),
    ]


def _offer(writer: TraceWriter, rate: int, seconds: float, rng: np.random.Generator) -> tuple[int, float]:
    """How many were submitted, and the seconds from the first until all are written."""
    models = [record(rng) for _ in range(2_000)]
    began = time.perf_counter()
    sent = pace(writer.submit, rate, lambda sent: sent >= rate * seconds, models, rng)
    offered_s = time.perf_counter() - began
    writer.flush(120.0)
    # The last batch waits for more to come, which is its delay and not the rate.
    return sent, max(offered_s, time.perf_counter() - began - TelemetrySettings().batch_delay_s)


def pace(
    submit: Callable[[TraceRecord], None],
    rate: int,
    done: Callable[[int], bool],
    models: Sequence[TraceRecord],
    rng: np.random.Generator,
) -> int:
    """Submit copies of the models at an even pace, in slices of 10 ms, until it is done, so many sent; how many."""
    began, sent = time.perf_counter(), 0
    while not done(sent):
        due = (time.perf_counter() - began) * rate
        while sent < due:
            one = models[sent % len(models)]
            fresh = UUID(int=int.from_bytes(rng.bytes(16), "big"), version=4)
            submit(replace(one, trace_id=fresh, started_at=datetime.now(UTC)))
            sent += 1
        time.sleep(0.01)
    return sent


@contextmanager
def compacting(url: str, every_s: float, ahead: timedelta = timedelta(0)) -> Iterator[None]:
    """The compactor beside it, as housekeeping runs it; ``ahead`` of its time takes minutes that are not over."""
    ended = threading.Event()

    def work() -> None:
        database = Database(url, application="compactor")
        while not ended.wait(every_s):
            with contextlib.suppress(SQLAlchemyError):  # where Postgres is killed it comes back
                upkeep.compact(database, datetime.now(UTC) + ahead)
        database.close()

    thread = threading.Thread(target=work, name="compactor", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _visible_after(database: Database, writer: TraceWriter, rng: np.random.Generator) -> float:
    """Seconds from handing a trace to the writer until the overview's totals count one more of its class."""
    one = replace(record(rng), traffic_class=PROBE, started_at=datetime.now(UTC))
    part = Slice(one.started_at - timedelta(hours=1), one.started_at + timedelta(hours=1), one.traffic_class)

    def counted() -> int:
        with database.read() as session:
            return sum(row["requests"] for row in PANELS["overview.totals"].read(session, part))

    before, began = counted(), time.perf_counter()
    writer.submit(one)
    while time.perf_counter() - began < 30.0 and counted() == before:
        time.sleep(0.01)
    return time.perf_counter() - began


def record(rng: np.random.Generator, payload: bool = False) -> TraceRecord:
    """A plausible request, with or without its tokens."""
    steps = int(rng.integers(8, 60))
    accepted = int(rng.integers(0, steps))
    ttft, decode = float(rng.lognormal(-2.5, 0.5)), steps * float(rng.lognormal(-3.7, 0.2))
    output = 1 + steps + accepted
    prompt = int(rng.integers(10, 800))
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
        prompt_tokens=prompt,
        output_tokens=output,
        steps=steps,
        drafted=4 * steps,
        accepted=accepted,
        drafted_per_pos=(steps,) * 4,
        accepted_per_pos=(accepted, 0, 0, 0),
        draft_s=0.05 * decode,
        verify_s=0.9 * decode,
        payload=_tokens(rng, prompt, output, steps, accepted) if payload else None,
    )


def _tokens(rng: np.random.Generator, prompt: int, output: int, steps: int, accepted: int) -> TracePayload:
    """Ids of a vocabulary of SmolLM2's size, four drafted at each step, one of them accepted at some."""
    ids = rng.integers(49_152, size=prompt + output + 4 * steps).tolist()
    drafted = ids[prompt + output :]
    return TracePayload(
        prompt_ids=tuple(ids[:prompt]),
        output_ids=tuple(ids[prompt : prompt + output]),
        steps=tuple(
            VerifyStep(tuple(drafted[4 * at : 4 * at + 4]), int(at < accepted), 1 + int(at < accepted))
            for at in range(steps)
        ),
    )
