"""What a target pass costs by the number of rows in it: profiled at start, kept true by the passes that really run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping

DRIFT = 0.1
"""Weight of one pass in the estimate of how fast the machine is now, compared with the profile, for all row counts."""
LEARN = 0.1
"""Weight of one pass in the estimate of its own row count, relative to that. Not less: the profile's passes are of one
sequence, those that run of many, and by its shape alone drafts beside sixteen requests did not pay that do
(docs/log.md)."""
SURPRISE = 0.5
"""A pass counts as at most this much off: one that was interrupted must not teach much."""


class StepCosts:
    """Seconds of a pass by rows. Calling it interpolates between the profiled counts and goes on straight beyond them.

    Two things move apart: the speed of the machine, which scales every count alike and so changes no decision, and the
    shape, which is what decides. Each pass corrects the first and the two nearest profiled counts, towards the mean of
    such passes: by their logarithms long ones would count for less than they take, and a pass with drafted rows that
    takes its mean would seem late.
    """

    def __init__(self, profile: Mapping[int, float]) -> None:
        """``profile``: rows → seconds, at least one of them."""
        if not profile or min(profile) < 1 or min(profile.values()) <= 0:
            raise ValueError(f"A profile of step costs needs positive row counts and seconds, got {dict(profile)}.")
        self.rows = sorted(profile)
        self._shape = [math.log(profile[rows]) for rows in self.rows]
        self._drift = 0.0

    def __call__(self, rows: int) -> float:
        return math.exp(self._drift) * self._relative(rows)

    def observe(self, rows: int, seconds: float) -> None:
        """A pass over ``rows`` tokens took ``seconds``."""
        if seconds <= 0:
            return
        off = _clip(seconds / self(rows) - 1)
        self._drift += DRIFT * off
        at = min(max(bisect_right(self.rows, rows) - 1, 0), max(len(self.rows) - 2, 0))
        left, right = self.rows[at], self.rows[min(at + 1, len(self.rows) - 1)]
        share = min(max((rows - left) / (right - left), 0.0), 1.0) if right > left else 0.0
        rest = LEARN * off
        self._shape[at] += (1 - share) * rest
        if right > left:
            self._shape[at + 1] += share * rest

    def table(self) -> dict[int, float]:
        """Rows → seconds, as believed now."""
        return {rows: self(rows) for rows in self.rows}

    def _relative(self, rows: int) -> float:
        counts, shape = self.rows, self._shape
        if rows <= counts[0] or len(counts) == 1:
            return math.exp(shape[0]) * (1.0 if rows >= 1 else 0.0)
        at = min(bisect_right(counts, rows) - 1, len(counts) - 2)
        low, high = math.exp(shape[at]), math.exp(shape[at + 1])
        slope = (high - low) / (counts[at + 1] - counts[at])
        if rows > counts[-1]:
            slope = max(slope, 0.0)
        return low + slope * (rows - counts[at])


def _clip(off: float) -> float:
    return min(max(off, -SURPRISE), SURPRISE)
