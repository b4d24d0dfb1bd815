"""How many threads a pass has: as many as have a processor to themselves.

The threads of a pass do each other's work, but for the piece that one has just taken, and all are waited for at its
end. So with another process on the machine that never pauses two threads take half as long again as one (docs/log.md).
How many processors a pass had is seen from outside of it: the processor time of its threads, who look for each other
while they wait, over the time it took.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

WINDOW_S = 0.1
"""Time of passes that is judged at once, seconds. Requests that come or go together keep the processors busy for some
20 ms; what follows is a prompt, which takes the longest of all passes with one thread."""
HALVED = 0.35
"""Of the last processor, what may be missing. With less of it than the rest, one thread fewer is faster."""
SHORTEST_S, LONGEST_S = 0.1, 2.5
"""With fewer threads until all are tried again, seconds: after the first loss, and after many tries in vain. By the
clock: who comes after a pause, with a prompt, may find the processors free that were not before it."""


class Crew:
    def __init__(
        self,
        most: int | None = None,
        appoint: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``most`` threads, all of torch's unless said; ``appoint`` sets how many there are from now on, in the thread
        that calls; ``clock`` in seconds."""
        self.most = self.threads = torch.get_num_threads() if most is None else most
        self._appoint, self._clock = appoint, clock
        self._processor_s = self._wall_s = 0.0
        self._wait_s, self._try_at, self._trying = SHORTEST_S, 0.0, False

    def muster(self) -> None:
        """Before a pass."""
        if self.threads < self.most and self._clock() >= self._try_at:
            self._trying, self._processor_s, self._wall_s = True, 0.0, 0.0
            self._set(self.most)

    def observe(self, processor_s: float, wall_s: float) -> None:
        """What a pass took, all its threads together and by the clock."""
        if self.most == 1:
            return
        self._processor_s += processor_s
        self._wall_s += wall_s
        if self._wall_s >= WINDOW_S:
            had, self._processor_s, self._wall_s = self._processor_s / self._wall_s, 0.0, 0.0
            self._judge(max(1, math.floor(had + HALVED)))

    def _judge(self, enough_for: int) -> None:
        """``enough_for``: threads that the processors of the last window were for."""
        if enough_for < self.threads:
            if self.threads == self.most:
                self._wait_s = min(2 * self._wait_s, LONGEST_S) if self._trying else SHORTEST_S
                self._try_at = self._clock() + self._wait_s
            self._set(enough_for)
        self._trying = False

    def _set(self, threads: int) -> None:
        self.threads = threads
        self._appoint(threads)
