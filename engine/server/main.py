"""Put the server together, run it, and take it down in order."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette

from engine.contracts import SlipstreamError, TraceRecord
from engine.model.graphs import graphs_on, no_graphs_on
from engine.model.loading import Target, configured_target
from engine.registry.artifacts import ArtifactStore
from engine.runner.engine import Engine
from engine.runner.profile import profile_step_costs
from engine.server.api import Api
from engine.server.auditor import Auditor
from engine.server.engine_thread import EngineThread
from engine.server.findings import Findings
from engine.server.residency import Residency
from engine.server.service import Service
from engine.server.shadow import Shadow
from engine.server.spare import SpareTime
from engine.server.subscriber import PlanSubscriber
from engine.settings import Settings
from engine.speculation.step_costs import StepCosts
from engine.store.database import Database
from engine.telemetry.metrics import Metrics
from engine.telemetry.spill import Spill, SpillRoom
from engine.telemetry.writer import TraceWriter

GRACE_S = 10
"""How long requests may run on after the server was told to stop, seconds."""
log = logging.getLogger(__name__)


class EngineServer:
    """One replica: target, engine thread, subscriber, trace writer, HTTP. ``settings.database_url`` must be set."""

    def __init__(self, settings: Settings, target: Target | None = None) -> None:
        if settings.database_url is None:
            raise SlipstreamError("The engine needs a database_url; `slipstream engine` finds the embedded one.")
        self.settings = settings
        chosen = settings.engine
        self.target = target or configured_target(settings, log.info)
        self.engine = Engine(
            self.target,
            max_num_seqs=chosen.max_num_seqs,
            max_model_len=chosen.max_model_len,
            prefill_chunk=chosen.prefill_chunk,
            max_queue=chosen.max_queue,
            kv_tokens=chosen.kv_tokens or None,
            capture_on=graphs_on if chosen.cuda_graphs else no_graphs_on,
        )
        self.database = Database(settings.database_url, application=f"slipstream {chosen.replica_id}")
        store = ArtifactStore(settings.dir("policies"))
        self.findings = Findings(self.database, chosen.replica_id)
        self.auditor = Auditor(self.engine, self.findings, chosen.audit_tokens_per_minute, time.monotonic)
        self.shadow = Shadow(self.engine, self.findings, lambda: self.residency.served, time.monotonic)
        self.thread = EngineThread(self.engine, chosen.request_timeout_s, spare=SpareTime([self.auditor, self.shadow]))
        self.residency = Residency(self.thread, self.target, store, chosen.plan_lease_s)
        self._spill_room = SpillRoom(settings.dir("spill"), chosen.replica_id)
        spill = Spill(self._spill_room.folder, settings.telemetry.spill_max_bytes)
        self.writer = TraceWriter(self.database, spill, settings.telemetry)
        self.metrics = Metrics(self.target.name, self._gauges)
        self.service = Service(
            self.target,
            self.thread,
            self.residency,
            self.writer,
            self.metrics,
            chosen.replica_id,
            settings.telemetry.payloads,
            self._ended,
        )
        self.subscriber = PlanSubscriber(self.database, self.residency, store, chosen, self._describe)
        self.socket = _listen(chosen.host, chosen.port)
        host, port = self.socket.getsockname()[:2]
        self.url = f"http://{host}:{port}"
        app = Api(self.service, chosen.max_body_bytes, self.not_ready, lambda: self.residency.error).app()
        app.router.lifespan_context = self._lifespan
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S)
        )

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        log.info("listening on %s/v1", self.url)
        self._uvicorn.run(sockets=[self.socket])

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.thread.start(asyncio.get_running_loop())
        # Bounded by itself; how long a single pass of a large target takes, nobody knows before.
        profile = self.thread.call(lambda: profile_step_costs(self.engine.runner), timeout_s=None)
        log.info("milliseconds of a target pass by rows: %s", {k: round(v, 1) for k, v in profile.items()})
        self.engine.control.costs = StepCosts({rows: ms / 1e3 for rows, ms in profile.items()})
        most = self.settings.learner.num_speculative_tokens
        self.thread.call(lambda: self.engine.runner.target_pass.prepare(most), timeout_s=None)
        self.residency.start()
        self.writer.start()
        self.findings.start()
        self.subscriber.start()
        yield
        self.subscriber.halt()
        await asyncio.to_thread(self.thread.stop)
        await asyncio.sleep(0)  # the last outputs are callbacks of this loop; each makes a trace
        await asyncio.to_thread(self.writer.close)  # before what may wait for a database that is away
        await asyncio.to_thread(self.findings.stop)
        self._spill_room.close()
        await asyncio.to_thread(self.subscriber.stop)
        self.database.close()

    def not_ready(self) -> str | None:
        if not self.thread.is_alive:
            return "the engine thread has ended; restart this replica"
        if self.residency.plan is None:
            return f"no serving plan is in force ({self.subscriber.error or 'it is being loaded'})"
        return None

    def _ended(self, record: TraceRecord, slice_name: str | None) -> None:
        self.auditor.offer(record)
        self.shadow.offer(record, slice_name)
        self.thread.nudge()

    def _gauges(self) -> dict[str, float]:
        engine, writer, plan = self.engine.stats(), self.writer.stats(), self.residency.plan
        return {
            "vllm:num_requests_running": engine["running"],
            "vllm:num_requests_waiting": engine["waiting"],
            "slipstream:draft_errors": engine["draft_errors"],
            "slipstream:step_errors": engine["step_errors"],
            "vllm:num_preemptions": engine["preemptions"],
            "slipstream:kv_blocks": engine["kv_blocks"],
            "slipstream:plan_generation": plan.generation if plan is not None else 0,
            "slipstream:plan_incomplete": float(self.residency.error is not None),
            "slipstream:plan_lease_expired": float(self.residency.lease_expired),
            "slipstream:trace_queue": writer["queue"],
            "slipstream:traces_written": writer["written"] + writer["replayed"],
            "slipstream:traces_dropped": writer["dropped"],
            "slipstream:traces_set_aside": writer["set_aside"],
            "slipstream:spill_files": writer["spill_files"],
            "slipstream:spill_bytes": writer["spill_bytes"],
            "slipstream:spill_unreadable": writer["spill_unreadable"],
            "slipstream:outputs_audited": self.findings.totals["audited"],
            "slipstream:output_mismatches": self.findings.totals["mismatches"],
            "slipstream:findings_waiting": float(self.findings.stats()["waiting"] or 0),
        }

    def _describe(self) -> tuple[str, str, dict[str, Any]]:
        """(address, model, what else the heartbeat says)."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        costs = self.engine.control.costs
        stats = {
            "pid": os.getpid(),
            "dtype": str(self.target.model.dtype).removeprefix("torch."),
            "device": str(self.target.model.device),
            "target_fingerprint": self.target.fingerprint,
            "tokenizer_fingerprint": self.target.tokenizer_fingerprint,
            "tokenizer": str(self.target.folder / "tokenizer.json"),
            "step_cost_ms": {str(rows): s * 1e3 for rows, s in costs.table().items()} if costs is not None else {},
            "peak_rss_bytes": peak,
            "lease_expired": self.residency.lease_expired,
            "engine": self.engine.stats(),
            "writer": self.writer.stats(),
            "audits": self.findings.totals,
            "findings": self.findings.stats(),
        }
        return self.url, self.target.name, stats


class ServerThread:
    """A server in a thread of this process, for tests and measurements."""

    def __init__(self, server: EngineServer) -> None:
        self.server = server
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """As SIGTERM would: finish what runs, write what is queued."""
        self.server._uvicorn.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self.server._uvicorn.serve(sockets=[self.server.socket]))


def serve(settings: Settings) -> None:
    """Run one replica in this process until it is told to stop."""
    server = EngineServer(settings)
    gc.collect()
    gc.freeze()  # the model and the libraries are never garbage; looking through them stops the engine for .2 s
    server.run()


def _listen(host: str, port: int) -> socket.socket:
    """Bound before the model is loaded, so that a taken port is known at once."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise SlipstreamError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Choose another: --set engine.port=N."
        ) from None
    return listener
