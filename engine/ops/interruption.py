"""How a command that owns processes ends: once, and with all it has started.

SIGTERM (`slipstream down`, a container's stop, `timeout`), SIGHUP (a terminal that is closed) and Ctrl-C are one and
the same: the first of them raises KeyboardInterrupt in the main thread, so what was started is ended by the ``finally``
that would end it after any other error. Later ones are heard no more: whoever presses Ctrl-C twice must not break off
the ending and leave an engine or a Postgres behind. Nor may the first be lost: what is raised while the collector calls
somebody back (a weak reference's callback, ``__del__``) ends there, so it is raised again a moment later.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
AGAIN_S = 0.01
"""After which an interruption that was swallowed is raised again, seconds: the collector is done by then."""


class _Moment:
    """What this process has heard, and how many steps are under way that must not be cut in two."""

    interrupted = False
    raised = False
    held = 0


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it the first signal raises KeyboardInterrupt, and only the first. In the main thread, not nested.

    What whoever started this process had it ignore (``nohup``) stays ignored.
    """
    _Moment.interrupted = _Moment.raised = False
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _interrupt) for number in heard}
    unraisable, timers = sys.unraisablehook, list[tuple[float, float]]()

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if not (_Moment.raised and isinstance(lost.exc_value, KeyboardInterrupt)):
            unraisable(lost)
            return
        _Moment.raised = False
        before.setdefault(signal.SIGALRM, signal.signal(signal.SIGALRM, _interrupt))
        timers.append(signal.setitimer(signal.ITIMER_REAL, AGAIN_S))  # takes no lock: this thread may hold any just now

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = unraisable
        for was in timers[:1]:
            signal.setitimer(signal.ITIMER_REAL, *was)
        for number, handler in before.items():
            signal.signal(number, handler)
        if _Moment.interrupted and not _Moment.raised:  # the block has ended before it could be raised again
            raise KeyboardInterrupt


@contextmanager
def held() -> Iterator[None]:
    """Put an interruption off until this step is done or has failed: a process that has started and is not yet noted
    would be left behind, and so would one whose ending is broken off."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's alone
        yield
        return
    _Moment.held += 1
    try:
        yield
    finally:
        _Moment.held -= 1
        _raise_if_due()


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    _Moment.interrupted = True
    _raise_if_due()


def _raise_if_due() -> None:
    if _Moment.interrupted and not _Moment.raised and not _Moment.held:
        _Moment.raised = True
        raise KeyboardInterrupt
