"""Rests between the pieces of an attempt: it takes its share of the time all along, not a stretch of it at once.

A learner that is at work for a tenth of a second and then rests for nine costs nothing on average, and the requests of
that tenth a core: the slowest of a minute are theirs. In pieces of milliseconds everybody loses a little.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PIECE_S = 0.002
"""Work after which there is a rest: less than an engine's pass, so that no pass loses its processor for long."""
LONGEST_S = 5.0
"""Of one rest, after which somebody is told that the attempt is alive: training goes on for seconds at a time."""


class Pace:
    """``share`` of a processor, by ``used``: processor seconds of this process. ``pause`` may return early."""

    def __init__(
        self, share: float, pause: Callable[[float], object], used: Callable[[], float] = time.process_time
    ) -> None:
        self.share, self._pause, self._used = share, pause, used
        self._worked_until = used()

    def begin(self) -> None:
        """Nothing that was done before is made up for."""
        self._worked_until = self._used()

    def rest(self, alive: Callable[[], None]) -> None:
        """Between two pieces: pause for as long as the work since the last rest demands."""
        worked = self._used() - self._worked_until
        if worked < PIECE_S:
            return
        left = worked * (1 / self.share - 1)
        while left > 0:
            self._pause(min(left, LONGEST_S))
            left -= LONGEST_S
            alive()
        self._worked_until = self._used()
