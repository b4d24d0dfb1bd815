"""What a dead database costs: Postgres is killed under load, stays dead a while, and is started again.

Every request must be answered and every trace must be in the table afterwards, once, in the rollups too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from engine.bench.report import Figure, Report, count_figure
from engine.bench.rig import Rig, rig, wait_until
from engine.contracts import SlipstreamError
from engine.demo import prompts
from engine.demo.traffic import Traffic, served_model
from engine.ops import postgres
from engine.ops.supervisor import Say
from engine.settings import Settings
from engine.store.repositories import audit

CLIENTS = 8
TOKENS = 12
STEADY_S = 10.0
"""Load before the kill and after the restart, seconds."""


def run(settings: Settings, outage_s: float, seed: int, say: Say) -> Report:
    with rig(settings, say) as system:
        traffic = Traffic(system.url, served_model(system.url), prompts.shipped(), CLIENTS, seed, max_tokens=TOKENS)
        traffic.start()
        try:
            time.sleep(STEADY_S)
            before = traffic.answered
            _kill_postgres(system, say)
            time.sleep(outage_s)
            during = traffic.answered - before
            say(f"{during} requests were answered without a database; starting it again")
            postgres.start(system.settings.home_path)
            time.sleep(STEADY_S)
        finally:
            traffic.stop()
        if during == 0:
            raise SlipstreamError("No request was answered while Postgres was dead, so the run shows nothing.")
        return Report("outage", seed, _figures(system, traffic, during))


def _figures(system: Rig, traffic: Traffic, during: int) -> list[Figure]:
    expected = traffic.request_ids

    def settled() -> bool:
        with system.database.read() as session:
            return len(audit.times_stored(session, expected)) == len(expected)

    with contextlib.suppress(SlipstreamError):  # what is missing is the figure
        wait_until(settled, "all traces in the table", 120.0, pause_s=0.5)
    with system.database.read() as session:
        stored = audit.times_stored(session, expected)
        twice = sum(count - 1 for count in stored.values())
        rollup_error = abs(audit.rolled_up(session) - audit.traces(session))
    sent = traffic.sent
    return [
        count_figure("outage_failed_requests", traffic.failed, sent, "requests"),
        count_figure("outage_traces_missing", len(expected) - len(stored), len(expected), "traces"),
        count_figure("outage_traces_twice", twice, len(expected), "traces"),
        count_figure("outage_rollup_error", rollup_error, len(expected), "requests"),
        count_figure("outage_answered_meanwhile", during, sent, "requests"),
    ]


def _kill_postgres(system: Rig, say: Say) -> None:
    """SIGKILL to the postmaster; its children end when they notice."""
    pid = postgres.postmaster_pid(system.settings.home_path)
    if pid is None:
        raise SlipstreamError("Postgres does not run, so it cannot be killed.")
    say(f"killing Postgres (process {pid})")
    os.kill(pid, signal.SIGKILL)
