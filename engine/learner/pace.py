"""Rests between the pieces of an attempt: it takes its share of the time all along, not a stretch of it at once.

A learner that is at work for a tenth of a second and then rests for nine costs little on average, and the requests of
that tenth a core: the slowest of a minute are theirs. Where the pieces are milliseconds, as those of a trace memory and
its gate, everybody loses a little. A step of training is one piece, and takes longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.contracts import SlipstreamError

PIECE_S = 0.002
"""Work after which there is a rest: less than an engine's pass, so that no pass loses its processor for long."""
LONGEST_S = 1.0
"""Of one rest, after which somebody is told that the attempt is alive, and is asked whether it shall be."""


class Stopped(SlipstreamError):
    """The process is to end: what is left of an attempt would outlive the patience of whoever ends it."""


class Pace:
    """``share`` of a processor, by ``used``: processor seconds of this process. ``is_stopping`` ends the attempt."""

    def __init__(
        self,
        share: float,
        pause: Callable[[float], None] = time.sleep,
        used: Callable[[], float] = time.process_time,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.share, self._pause, self._used, self._is_stopping = share, pause, used, is_stopping
        self._worked_until = used()

    def begin(self) -> None:
        """Nothing that was done before is made up for."""
        self._worked_until = self._used()

    def rest(self, alive: Callable[[], None]) -> None:
        """Between two pieces: pause for as long as the work since the last rest demands. Stopped where there shall be
        no further piece."""
        worked = self._used() - self._worked_until
        if worked >= PIECE_S:
            left = worked * (1 / self.share - 1)
            while left > 0 and not self._is_stopping():
                self._pause(min(left, LONGEST_S))
                left -= LONGEST_S
                alive()
            self._worked_until = self._used()
        if self._is_stopping():
            raise Stopped("This process ends: the attempt is given up, and the next learner makes another.")
