"""How often, and on how many held-out requests, candidates are judged: each look at the same ones costs error level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.learner.traces import MAX_HELD_OUT

ALPHA = 0.05
MIN_HELD_OUT = 8
"""Fewer held-out requests than this prove nothing, whatever they say."""
MAX_LOOKS = 6
"""Refused candidates that may look at the same held-out requests. The next ones are judged on later requests."""
LEVEL = ALPHA / MAX_LOOKS
"""Of the bounds of one look: over all looks at the same requests no more than α errs (Bonferroni)."""
GROWTH = 1.5
"""How many times the requests of the look before a look needs. What is learned in between seldom changes a verdict that
evidence did not, every look costs error level, and its requests must go through the target."""


@dataclass(frozen=True, slots=True)
class Look:
    """A refused candidate's: at how many held-out ``requests``, the last of them no later than ordinal ``through``."""

    through: int
    requests: int


def unspent(passed_through: int, looks: Sequence[Look]) -> tuple[int, Look | None]:
    """(the ordinal after which held-out requests may still judge, the last look at any of them).

    ``passed_through``: the last ordinal that the newest version's gate could see; ``looks``: since then, oldest first.
    A refusal without a comparison has seen nothing and is none.
    """
    spent = len(looks) // MAX_LOOKS * MAX_LOOKS
    return (looks[spent - 1].through if spent else passed_through), (looks[-1] if looks[spent:] else None)


def due(ordinals: Sequence[int], last: Look | None) -> bool:
    """Whether the held-out requests of these ``ordinals`` are enough for a look after the ``last`` one at them.

    What is new is counted: of the old ones some leave meanwhile, by retention or because a tenant was forgotten.
    """
    if len(ordinals) < MIN_HELD_OUT or last is None:
        return len(ordinals) >= MIN_HELD_OUT
    fresh = sum(ordinal > last.through for ordinal in ordinals)
    return fresh >= (GROWTH - 1) * min(last.requests, MAX_HELD_OUT)
