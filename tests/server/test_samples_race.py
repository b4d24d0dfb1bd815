"""The engine's thread asks what is due while the event loop offers: neither may end the other."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

from engine.server.auditor import Auditor
from engine.server.spare import SpareTime
from tests.server.test_auditor import record


def test_offers_from_another_thread_never_break_a_look() -> None:
    auditor = Auditor(SimpleNamespace(resident=()), None, 1_000, lambda: 0.0)  # type: ignore[arg-type]
    interval, over = sys.getswitchinterval(), threading.Event()

    def offering() -> None:
        for number in range(4_000):
            auditor.offer(record(version=number % 40))
        over.set()

    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=offering)
        thread.start()
        while not over.is_set():
            auditor.due_in()
        thread.join()
    finally:
        sys.setswitchinterval(interval)


def test_a_look_that_fails_does_not_get_out() -> None:
    broken = SimpleNamespace(in_line=True, due_in=lambda: 1 / 0, piece=lambda: None)
    spare = SpareTime([broken])
    assert spare.due_in() is None
    spare.piece()
    spare.busy()
    spare.busy()
