"""Components are started, started again, and ended with everything they started."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.contracts import SlipstreamError
from engine.ops.supervisor import Component, Supervisor, end_group, is_alive, read_state, state_file
from engine.ops.system import unless_ready
from tests.waiting import until


class Clock:
    """Monotonic seconds that move only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    clock = Clock()
    made = Supervisor(tmp_path, lambda _: None, clock, clock.sleep)
    yield made
    made.stop()


def component(code: str, name: str = "part", ready: Callable[[], bool] = lambda: True) -> Component:
    return Component(name, [sys.executable, "-c", textwrap.dedent(code)], dict(os.environ), ready=ready)


FOR_EVER = "import threading; threading.Event().wait()"


def test_what_ends_is_started_again_later_and_later(supervisor: Supervisor) -> None:
    supervisor.start(component("raise SystemExit(3)"))
    clock: Clock = supervisor.clock  # type: ignore[assignment]
    waits = []
    for _ in range(3):
        until(lambda: not is_alive(supervisor.pid("part")), "its processes have come that far")
        before, pid = clock.now, supervisor.pid("part")
        supervisor.watch_once()
        while supervisor.pid("part") == pid:
            clock.now += 0.5
            supervisor.watch_once()
        waits.append(clock.now - before)
    assert waits == [1.0, 2.0, 5.0]


def test_stopping_takes_grandchildren_along(supervisor: Supervisor, tmp_path: Path) -> None:
    pid_file = tmp_path / "grandchild"
    supervisor.start(
        component(
            f"""
            import subprocess, sys, threading
            child = subprocess.Popen([sys.executable, "-c", {FOR_EVER!r}])
            open({str(pid_file)!r}, "w").write(str(child.pid))
            threading.Event().wait()
            """
        )
    )
    until(lambda: pid_file.exists() and pid_file.read_text() != "", "its processes have come that far")
    parent, grandchild = supervisor.pid("part"), int(pid_file.read_text())
    assert is_alive(grandchild)
    supervisor.stop()
    assert not is_alive(parent)
    until(lambda: not is_alive(grandchild), "its processes have come that far")


def test_state_is_on_disk_while_something_runs(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start(component(FOR_EVER))
    state = read_state(tmp_path)
    assert state is not None
    assert state["components"]["part"]["pid"] == supervisor.pid("part")
    supervisor.stop()
    assert read_state(tmp_path) is None


def test_a_number_that_another_process_has_now_is_not_ours(supervisor: Supervisor, tmp_path: Path) -> None:
    """As after a reboot: the state file is there, its numbers run, but they were born later."""
    supervisor.start(component(FOR_EVER))
    path = state_file(tmp_path)
    state = json.loads(path.read_text())
    for part in (state, state["components"]["part"]):
        part["born"] -= 3_600
    path.write_text(json.dumps(state))
    assert read_state(tmp_path) is None


def test_a_component_that_dies_while_starting_is_an_error_with_its_log(supervisor: Supervisor) -> None:
    supervisor.start(component("print('no such model'); raise SystemExit(2)", ready=lambda: False))
    until(lambda: not is_alive(supervisor.pid("part")), "its processes have come that far")
    with pytest.raises(SlipstreamError, match=r"ended with code 2[\s\S]*no such model"):
        supervisor.wait_ready("part", 10.0)


def test_a_component_that_never_gets_ready_is_an_error(supervisor: Supervisor) -> None:
    supervisor.start(component(FOR_EVER, ready=lambda: False))
    with pytest.raises(SlipstreamError, match="was not ready after 7 s"):
        supervisor.wait_ready("part", 7.0)


@pytest.mark.parametrize("name", ["mlflow", "dashboard"])
def test_a_view_that_is_late_is_waited_for_no_longer_and_one_that_ended_is_an_error(
    supervisor: Supervisor, name: str
) -> None:
    ready = [True]
    supervisor.start(component(FOR_EVER, name, ready=lambda: ready[0]))
    assert unless_ready(supervisor, name) == ""
    ready[0] = False
    assert f"slipstream logs {name}" in unless_ready(supervisor, name)
    end_group(supervisor.pid(name), grace_s=0.0)
    until(lambda: not is_alive(supervisor.pid(name)), "it has ended")
    with pytest.raises(SlipstreamError, match=f"{name} ended with code"):
        unless_ready(supervisor, name)


@pytest.mark.parametrize("yielding", [True, False])
def test_what_yields_to_serving_yields_where_that_is_wanted(supervisor: Supervisor, yielding: bool) -> None:
    supervisor.yielding = yielding
    supervisor.start(replace(component(FOR_EVER), niceness=3))
    expected = os.nice(0) + (3 if yielding else 0)
    until(lambda: os.getpriority(os.PRIO_PROCESS, supervisor.pid("part")) == expected, "it has lowered itself")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a policy for it")
@pytest.mark.parametrize(("gives_way", "yielding"), [(True, True), (True, False), (False, True)])
def test_what_gives_way_runs_where_nothing_else_does(supervisor: Supervisor, gives_way: bool, yielding: bool) -> None:
    supervisor.yielding = yielding
    supervisor.start(replace(component(FOR_EVER), gives_way=gives_way))
    expected = os.SCHED_IDLE if gives_way and yielding else os.SCHED_OTHER
    assert os.sched_getscheduler(supervisor.pid("part")) == expected


def test_components_share_a_session_and_are_groups_of_their_own(supervisor: Supervisor) -> None:
    """Between sessions Linux shares the processor evenly, whoever gives way."""
    supervisor.start(component(FOR_EVER))
    pid = supervisor.pid("part")
    assert os.getsid(pid) == os.getsid(0)
    assert os.getpgid(pid) == pid


def test_ending_a_group_that_is_gone_is_no_error() -> None:
    end_group(2**22 - 1, grace_s=0.0)


def test_what_others_talk_to_is_ended_after_them(supervisor: Supervisor, tmp_path: Path) -> None:
    """Each writes its name when it is told to end; the server must be last, though it was started first."""
    order = tmp_path / "order"
    code = """
        import signal, sys, threading
        def end(*_):
            open({order!r}, "a").write({name!r} + "\\n")
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        open({order!r} + {name!r}, "w").close()
        threading.Event().wait()
    """
    for name, outlives in (("server", True), ("client", False)):
        made = component(code.format(order=str(order), name=name), name)
        supervisor.start(replace(made, outlives=outlives))
    until(
        lambda: all(Path(f"{order}{name}").exists() for name in ("server", "client")),
        "its processes have come that far",
    )
    supervisor.stop()
    assert order.read_text().split() == ["client", "server"]
