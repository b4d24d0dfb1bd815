"""Whether the target hands a request's hidden states to its neural draft.

Reading them takes as long as drafting does (docs/log.md). So where a class does not ask its draft, its requests do not
listen, but for one in ``SAMPLED``, by which probes find out whether drafting pays again. Then the others listen from
where they stand, and new ones from their prompts on.
"""

from __future__ import annotations

SAMPLED = 32
"""One of so many requests of a class and version listens in any case, from its first token to its last."""
SETTLED = 16
"""Steps by which those that want the draft, or those that do not, must be more before all listen, or none: loads
flicker."""
WARM = 32
"""Steps for which a request that began late only listens: a draft that sees little of what was said is mostly wrong.
After 32 tokens it brings two thirds of what it brings knowing all, after 4 a quarter (docs/log.md)."""


class Audience:
    """The requests of a policy version in one traffic class."""

    def __init__(self) -> None:
        self._requests, self._wanted = 0, SETTLED

    @property
    def verdict(self) -> bool | None:
        """Whether its requests listen; None while that is open, and each goes on as it does."""
        return self._wanted > 0 if self._wanted in (0, SETTLED) else None

    def join(self) -> Listening:
        self._requests += 1
        return Listening(self, self._requests % SAMPLED == 0)

    def weigh(self, wanted: bool) -> None:
        """Whether a step asks the draft, probes apart, or would if it had listened: once in each step."""
        self._wanted = min(max(self._wanted + (1 if wanted else -1), 0), SETTLED)


class Listening:
    """One request. ``on``: whether its draft is given the states of its tokens in the pass to come."""

    def __init__(self, audience: Audience, sampled: bool) -> None:
        self._audience, self._sampled = audience, sampled
        self.on, self._steps = True, WARM

    @property
    def is_ready(self) -> bool:
        """Whether the draft has heard enough to be asked; before ``step``."""
        return self.on and self._steps >= WARM

    def begin(self, wanted: bool) -> None:
        """Its prompt is about to be computed. A request that hears all of it need not wait to be asked."""
        self.on = wanted or self._sampled
        self._steps = WARM if self.on else 0

    def step(self) -> None:
        """It is about to decode; after its audience has weighed the step."""
        if self._sampled:
            return
        if (verdict := self._audience.verdict) is not None:
            self.on = verdict
        self._steps = self._steps + 1 if self.on else 0
