"""Waiting in tests: for a condition, never for a time."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable


def until(condition: Callable[[], bool], what: str, tries: int = 3_000, pause_s: float = 0.01) -> None:
    """Look again and again; the condition ends it, not the time."""
    pause = threading.Event()
    for _ in range(tries):
        if condition():
            return
        pause.wait(pause_s)
    raise AssertionError(f"in vain: {what}")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
