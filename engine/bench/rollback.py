"""How fast a bad policy is taken back under load, and whether anybody notices.

Each try puts a policy that drafts garbage on half of the traffic, waits until it serves, and rolls back: by the
command, interpreter start included; by the one transaction that is behind everything; or by a click in a real browser.
Effective is the moment after which no new request was given to the bad policy: the later of the replica's own
observation and the last start among the traces of the canary.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from engine.bench.browser import browser
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


Prepare = Callable[[ServingPlan], Callable[[], None]]
"""Makes everything ready to take a canary's plan back, and gives the last press."""


@dataclass(frozen=True, slots=True)
class Try:
    """One rollback: the generation taken back, when it was asked for, when the replica observed the next one."""

    generation: int
    asked: datetime
    observed: datetime


def run(settings: Settings, tries: int, seed: int, say: Say, by_click: bool = False) -> Report:
    """``tries`` rollbacks in each way; ``by_click`` too wants Playwright and Chromium, and says so without them."""
    with ExitStack() as stack:
        system = stack.enter_context(rig(settings, say))
        ways = {"command": _command(system), "transaction": _transaction(system)}
        if by_click:
            ways["click"] = stack.enter_context(browser(system, say)).roll_back
        traffic = Traffic(system.url, served_model(system.url), prompts.shipped(), CLIENTS, seed, max_tokens=TOKENS)
        traffic.start()
        try:
            wait_until(lambda: system.stored() >= TAUGHT_BY, f"{TAUGHT_BY} traces", 300.0, pause_s=0.2)
            bad = garbage.publish(system.settings, system.database, np.random.default_rng(seed)).version
            found = {way: list[Try]() for way in ways}
            for n in range(tries):  # in turn: what the machine does meanwhile is the same for all ways
                for way, prepare in ways.items():
                    found[way].append(_try(system, bad, f"{way} {n + 1}/{tries}", prepare, say))
        finally:
            traffic.stop()
        wait_until(lambda: system.stored() >= traffic.answered, "all traces in the table", 60.0, pause_s=0.2)
        return Report("rollback", seed, _figures(system, found, traffic, seed))


def _figures(system: Rig, found: Mapping[str, Sequence[Try]], traffic: Traffic, seed: int) -> list[Figure]:
    """The command, which is what an operator types, gives the headline."""
    rng = np.random.default_rng(seed)
    with system.database.read() as session:
        not_ok = audit.not_ok(session)
    figures = []
    for way, tries in found.items():
        name = "effective" if way == "command" else way
        seconds = [_seconds(system, one) for one in tries]
        figures += [quantile_figure(f"rollback_{name}_p{q * 100:g}_s", seconds, q, "s", rng) for q in (0.99, 0.50)]
    failed = max(traffic.failed, not_ok)
    return [*figures, count_figure("rollback_failed_requests", failed, traffic.sent, "requests")]


def _try(system: Rig, bad: int, name: str, prepare: Prepare, say: Say) -> Try:
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
    system.followed(canary)
    wait_until(lambda: _last_bad(system, canary.generation) is not None, "a canary request", 60.0, pause_s=0.05)
    press = prepare(canary)
    asked = datetime.now(UTC)
    press()
    wait_until(lambda: _is_taken_back(system, canary), f"generation {canary.generation} taken back", 30.0)
    with system.database.read() as session:
        plan = plans.latest(session)
    assert plan is not None
    observed = system.followed(plan)
    say(f"{name}: effective after {(observed - asked).total_seconds():.3f} s")
    return Try(canary.generation, asked, observed)


def _seconds(system: Rig, one: Try) -> float:
    """Seconds from the decision until no new request was given to the bad policy, by the traces."""
    return (max(one.observed, _last_bad(system, one.generation) or one.observed) - one.asked).total_seconds()


def _transaction(system: Rig) -> Prepare:
    def press() -> None:
        with system.database.write() as session:
            plans.roll_back(session, actor="bench", reason="garbage")

    return lambda _: press


def _command(system: Rig) -> Prepare:
    argv = [sys.executable, "-m", "engine.cli", "rollback", "--reason", "garbage"]
    environ = child_environment(system.settings)

    def press() -> None:
        subprocess.run(argv, env=environ, check=True, capture_output=True)

    return lambda _: press


def _is_taken_back(system: Rig, canary: ServingPlan) -> bool:
    with system.database.read() as session:
        plan = plans.latest(session)
    return plan is not None and plan.generation > canary.generation


def _last_bad(system: Rig, generation: int) -> datetime | None:
    with system.database.read() as session:
        return audit.last_start(session, generation, CANARY)
