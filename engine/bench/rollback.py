"""How fast a bad policy is taken back under load, and whether anybody notices.

Each try puts a policy that drafts garbage on half of the traffic, waits until it serves, and rolls back: by the
transaction behind the button, or by the command itself, interpreter start included. Effective is the moment after which
no new request was given to the bad policy: the later of the replica's own observation and the last start among the
traces of the canary.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from engine.bench.report import Figure, Report, count_figure, quantile_figure
from engine.bench.rig import Rig, rig, wait_until
from engine.contracts import CANARY, CONTROL, Arm, ServingPlan
from engine.demo import garbage, prompts
from engine.demo.traffic import Traffic, served_model
from engine.ops.supervisor import Say
from engine.settings import Settings, child_environment
from engine.store.repositories import audit, plans

CLIENTS = 8
TOKENS = 12
TAUGHT_BY = 48
"""Traces the garbage policy is made from: enough that it drafts something almost everywhere."""


@dataclass(frozen=True, slots=True)
class Try:
    """One rollback: the generation taken back, when it was asked for, when the replica observed the next one."""

    generation: int
    asked: datetime
    observed: datetime


def run(settings: Settings, tries: int, seed: int, say: Say) -> Report:
    """``tries`` rollbacks by the transaction and as many by the command."""
    with rig(settings, say) as system:
        traffic = Traffic(system.url, served_model(system.url), prompts.shipped(), CLIENTS, seed, max_tokens=TOKENS)
        traffic.start()
        try:
            wait_until(lambda: _count(system) >= TAUGHT_BY, f"{TAUGHT_BY} traces", 300.0, pause_s=0.2)
            bad = garbage.publish(system.settings, system.database, np.random.default_rng(seed)).version
            by_call = [_try(system, bad, f"call {n + 1}/{tries}", _call, say) for n in range(tries)]
            by_command = [_try(system, bad, f"command {n + 1}/{tries}", _command, say) for n in range(tries)]
        finally:
            traffic.stop()
        wait_until(lambda: _count(system) >= traffic.answered, "all traces in the table", 60.0, pause_s=0.2)
        return Report("rollback", seed, _figures(system, by_call, by_command, traffic, seed))


def _figures(
    system: Rig, by_call: Sequence[Try], by_command: Sequence[Try], traffic: Traffic, seed: int
) -> list[Figure]:
    rng = np.random.default_rng(seed)
    with system.database.read() as session:
        not_ok = audit.not_ok(session)
    call, command = ([_seconds(system, one) for one in tries] for tries in (by_call, by_command))
    return [
        quantile_figure("rollback_effective_p99_s", call, 0.99, "s", rng),
        quantile_figure("rollback_effective_p50_s", call, 0.50, "s", rng),
        quantile_figure("rollback_command_p99_s", command, 0.99, "s", rng),
        quantile_figure("rollback_command_p50_s", command, 0.50, "s", rng),
        count_figure("rollback_failed_requests", max(traffic.failed, not_ok), traffic.sent, "requests"),
    ]


def _try(system: Rig, bad: int, name: str, roll_back: Callable[[Rig], None], say: Say) -> Try:
    with system.database.write() as session:
        now = plans.latest(session)
        assert now is not None  # the engine is ready, so it observes a plan
        canary = plans.append(
            session,
            champion=now.champion,
            fallback=now.fallback,
            rollback_to=now.champion,
            arms=(Arm(CANARY, bad, 0.5), Arm(CONTROL, now.champion, 0.5)),
            salt=name,
            actor="bench",
            reason="a policy that drafts garbage",
        )
    wait_until(lambda: _observed(system, canary) is not None, f"generation {canary.generation} observed", 30.0)
    wait_until(lambda: _last_bad(system, canary.generation) is not None, "a canary request", 60.0, pause_s=0.05)
    asked = datetime.now(UTC)
    roll_back(system)
    with system.database.read() as session:
        plan = plans.latest(session)
    assert plan is not None
    wait_until(lambda: _observed(system, plan) is not None, f"generation {plan.generation} observed", 30.0)
    observed = _observed(system, plan)
    assert observed is not None
    say(f"{name}: effective after {(observed - asked).total_seconds():.3f} s")
    return Try(canary.generation, asked, observed)


def _seconds(system: Rig, one: Try) -> float:
    """Seconds from the decision until no new request was given to the bad policy, by the traces."""
    return (max(one.observed, _last_bad(system, one.generation) or one.observed) - one.asked).total_seconds()


def _call(system: Rig) -> None:
    with system.database.write() as session:
        plans.roll_back(session, actor="bench", reason="garbage")


def _command(system: Rig) -> None:
    argv = [sys.executable, "-m", "engine.cli", "rollback", "--reason", "garbage"]
    subprocess.run(argv, env=child_environment(system.settings), check=True, capture_output=True)


def _observed(system: Rig, plan: ServingPlan) -> datetime | None:
    with system.database.read() as session:
        seen = [o.observed_at for o in plans.observations(session, plan.generation) if o.error is None]
    return max(seen) if seen else None


def _last_bad(system: Rig, generation: int) -> datetime | None:
    with system.database.read() as session:
        return audit.last_start(session, generation, CANARY)


def _count(system: Rig) -> int:
    with system.database.read() as session:
        return audit.traces(session)
