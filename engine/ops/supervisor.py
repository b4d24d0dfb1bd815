"""Start, watch and stop the processes of one machine.

Every component is a process group of its own with a log file of its own, so that stopping it takes its children along.
All are in one session: where Linux shares the processor between sessions, who yields to whom counts inside one only.
A component that ends by itself is started again, later and later. What runs is written to ``run/system.json`` for
`slipstream status` and `slipstream down`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from engine.contracts import SlipstreamError
from engine.ops.interruption import held

Say = Callable[[str], None]
GRACE_S = 15.0
"""How long a component may take to end after SIGTERM before it is killed."""
BACKOFF_S = (1.0, 2.0, 5.0, 15.0, 60.0)
SAME_BIRTH_S = 10.0
"""Two births of one process number that lie closer are one: clocks are set, and numbers do not come round so fast."""
STEADY_S = 60.0
"""A component that ran this long starts its backoff from the beginning."""


class Late(SlipstreamError):
    """A component that runs and is not ready in its time."""


@dataclass(frozen=True, slots=True)
class Component:
    """One process of the system: how it starts and how one sees that it is ready.

    ``niceness`` is added to the supervisor's own: what nobody waits for must not take the cores from serving. One that
    ``gives_way`` runs where a core has nothing else to do, and is taken off it by whoever wakes (Linux' SCHED_IDLE; its
    niceness has to do elsewhere). One that ``outlives`` the others is ended after them, for they may still be talking
    to it.
    """

    name: str
    argv: Sequence[str]
    environ: Mapping[str, str]
    url: str | None = None
    ready: Callable[[], bool] = lambda: True
    niceness: int = 0
    gives_way: bool = False
    outlives: bool = False


@dataclass(slots=True)
class _Running:
    component: Component
    process: subprocess.Popen[bytes]
    started: float
    restarts: int = 0
    restart_at: float | None = None


@dataclass(slots=True)
class Supervisor:
    """Owns the components it started. ``clock`` is monotonic seconds, ``sleep`` waits; both are arguments for tests.

    Without ``yielding`` all components are equal.
    """

    home: Path
    say: Say
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    yielding: bool = True
    _running: dict[str, _Running] = field(default_factory=dict)

    def start(self, component: Component) -> None:
        with held():
            self._running[component.name] = _Running(component, self._spawn(component), self.clock())
            self._write_state()

    def wait_ready(self, name: str, timeout_s: float) -> None:
        """Wait until a component says it is ready; SlipstreamError with its log's end where it ended, Late where it has
        not."""
        running = self._running[name]
        deadline = self.clock() + timeout_s
        while not running.component.ready():
            if running.process.poll() is not None:
                raise SlipstreamError(f"{name} ended with code {running.process.returncode}.\n{self.log_tail(name)}")
            if self.clock() > deadline:
                raise Late(f"{name} was not ready after {timeout_s:.0f} s.\n{self.log_tail(name)}")
            self.sleep(0.2)

    def watch_once(self) -> None:
        """Start again whatever has ended, with backoff. A machine that cannot (full disk, no processes) is no reason to
        stop what still runs."""
        for name, running in self._running.items():
            if running.process.poll() is None:
                continue
            now = self.clock()
            if running.restart_at is None:
                if now - running.started > STEADY_S:
                    running.restarts = 0
                self._put_off(running, now, f"{name} ended with code {running.process.returncode}")
            elif now >= running.restart_at:
                end_group(running.process.pid, grace_s=0.0)  # children it left behind
                try:
                    with held():
                        running.process = self._spawn(running.component)
                    running.started, running.restart_at = now, None
                    running.restarts += 1
                    self._write_state()
                except OSError as error:
                    running.restarts += 1
                    self._put_off(running, now, f"{name} could not be started: {error}")

    def _put_off(self, running: _Running, now: float, what: str) -> None:
        wait = BACKOFF_S[min(running.restarts, len(BACKOFF_S) - 1)]
        running.restart_at = now + wait
        self.say(f"{what}; starting it again in {wait:.0f} s")

    def stop(self) -> None:
        """End every component and all their children: together, but for those that outlive the others."""
        with held():
            for outlives in (False, True):
                self._stop_together([r for r in self._running.values() if r.component.outlives is outlives])
            self._running.clear()
            with contextlib.suppress(FileNotFoundError):
                state_file(self.home).unlink()

    def pid(self, name: str) -> int:
        return self._running[name].process.pid

    def log_tail(self, name: str, lines: int = 15) -> str:
        path = log_file(self.home, name)
        text = path.read_text(errors="replace").splitlines()[-lines:] if path.exists() else []
        return f"The end of {path}:\n  " + "\n  ".join(text)

    def _stop_together(self, ending: list[_Running]) -> None:
        for running in ending:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.process.pid, signal.SIGTERM)
        for running in ending:
            try:
                running.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                self.say(f"{running.component.name} did not end within {GRACE_S:.0f} s and was killed")
            end_group(running.process.pid, grace_s=1.0)
            running.process.wait()

    def _spawn(self, component: Component) -> subprocess.Popen[bytes]:
        path = log_file(self.home, component.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        niceness = component.niceness if self.yielding else 0
        lowered = ["nice", "-n", str(niceness)] if niceness else []
        with path.open("ab") as out:
            process = subprocess.Popen(
                [*lowered, *component.argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(component.environ),
                process_group=0,
            )
        if component.gives_way and self.yielding:
            _give_way(process.pid)
        return process

    def _write_state(self) -> None:
        state = {
            **_identity(os.getpid()),
            "started_at": datetime.now(UTC).isoformat(),
            "components": {
                name: _identity(r.process.pid) | {"url": r.component.url, "restarts": r.restarts}
                for name, r in self._running.items()
            },
        }
        path = state_file(self.home)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state, indent=1))
        temporary.replace(path)


def _give_way(pid: int) -> None:
    """A nice thread keeps its core until its slice has ended, whoever wakes; an idle one does not (docs/log.md)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # it ended, or a sandbox forbids it
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))


def log_file(home: Path, name: str) -> Path:
    return home / "logs" / f"{name}.log"


def state_file(home: Path) -> Path:
    return home / "run" / "system.json"


def read_state(home: Path) -> dict[str, Any] | None:
    """What runs on this machine by the last word of its supervisor; None when nothing was started or all has ended."""
    try:
        state: dict[str, Any] = json.loads(state_file(home).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return state if any(map(is_running, [state, *state["components"].values()])) else None


def is_running(part: Mapping[str, Any]) -> bool:
    """Whether what the state file names still runs: after a reboot the same number may be somebody else's."""
    return is_alive(part["pid"], part["born"])


def is_alive(pid: int, born: float | None = None) -> bool:
    """Whether a process runs; a zombie does not, nor does one that got the number of a process ``born`` earlier."""
    try:
        process = psutil.Process(pid)
        same = born is None or abs(process.create_time() - born) < SAME_BIRTH_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _identity(pid: int) -> dict[str, Any]:
    """A process by number and birth (seconds since the epoch; None when it has gone already)."""
    try:
        return {"pid": pid, "born": psutil.Process(pid).create_time()}
    except psutil.NoSuchProcess:
        return {"pid": pid, "born": None}


def end_group(pgid: int, grace_s: float) -> None:
    """End what is left of a process group: SIGTERM, then SIGKILL after ``grace_s``."""
    try:
        os.killpg(pgid, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            os.killpg(pgid, 0)
            time.sleep(0.05)
        os.killpg(pgid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
