"""What the engine's thread does while nothing runs and nothing waits: one small piece, then it looks again.

A request that arrives waits for one piece at most, and a piece is bounded in tokens. What is done in spare time is
bounded per minute, and goes on where it stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

PIECE_TOKENS = 8
"""Tokens of one piece: few, for a request that arrives meanwhile waits for it."""
IN_LINE = 0.01
"""Share of a busy engine's time that work in line may take."""
SETTLED_S = 0.1
"""A pause is spare once it has lasted this long: a client that answers at once finds nobody in its way."""
log = logging.getLogger(__name__)


class SpareWork(Protocol):
    """Something to be done in pieces, on the engine's thread. ``in_line``: between the steps of a busy engine too."""

    @property
    def in_line(self) -> bool: ...

    def due_in(self) -> float | None:
        """Seconds until there is a piece to do, 0 for now; None while there is nothing."""

    def piece(self) -> None:
        """Do one piece."""


class SpareTime:
    """Kinds of work in the order of their importance. Used by the engine's thread alone."""

    def __init__(self, works: Sequence[SpareWork], clock: Callable[[], float] = time.monotonic) -> None:
        self._works, self._clock = works, clock
        self._idle_since: float | None = None
        self._step_began: float | None = None
        self._credit = 0.0  # seconds that work in line may take; what one piece took too long, the next ones wait for

    def busy(self) -> None:
        """A step is about to be made."""
        now, self._idle_since = self._clock(), None
        since, self._step_began = self._step_began, now
        if since is None:
            return
        self._credit = min(self._credit + IN_LINE * (now - since), 0.0)
        if self._credit >= 0 and self._do([work for work in self._works if work.in_line]):
            self._step_began = self._clock()
            self._credit -= self._step_began - now

    def due_in(self) -> float | None:
        """Seconds until a piece should be done, if nothing comes; None: nothing to wait for."""
        due = min((due for work in self._works if (due := _due_in(work)) is not None), default=None)
        if self._idle_since is None:
            self._idle_since, self._step_began = self._clock(), None
        return None if due is None else max(due, self._idle_since + SETTLED_S - self._clock(), 0.0)

    def piece(self) -> None:
        """One piece of what is most important and due."""
        self._do(self._works)

    def _do(self, works: Sequence[SpareWork]) -> bool:
        """Whether there was a piece to do. What fails in it is its own affair, not the engine's."""
        for work in works:
            due = _due_in(work)
            if due is not None and due <= 0:
                try:
                    work.piece()
                except Exception:
                    log.exception("%s failed in spare time", type(work).__name__)
                return True
        return False


def _due_in(work: SpareWork) -> float | None:
    """Asked on the thread that serves: what fails there has nothing to do, and ends nobody's requests."""
    try:
        return work.due_in()
    except Exception:
        log.exception("%s cannot say what is due", type(work).__name__)
        return None


class Allowance:
    """At most ``per_minute`` tokens: what was not used is there for a minute, and no longer."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._left, self._at = float(per_minute), clock()

    def spend(self, tokens: int) -> None:
        self._refill()
        self._left -= tokens

    def due_in(self) -> float | None:
        """Seconds until the next piece may be done; None where nothing ever may."""
        if not self._per_minute:
            return None
        self._refill()
        return max(0.0, (min(PIECE_TOKENS, self._per_minute) - self._left) * 60.0 / self._per_minute)

    def _refill(self) -> None:
        now = self._clock()
        self._left = min(float(self._per_minute), self._left + (now - self._at) * self._per_minute / 60.0)
        self._at = now
