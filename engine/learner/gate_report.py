"""What the gate found: a comparison of two policies over the same requests, and the verdict on one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engine.learner.looks import LEVEL

AHEAD = 200
"""Requests to come for which a class must not lose."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Tokens per verify step of both over the same ``n`` requests; ``low`` and ``high`` bound the change, one-sided.

    ``ahead`` bounds the share that changes over the next ``AHEAD`` requests of all classes, None of too few to say.
    ``champion_ms`` and ``candidate_ms`` are milliseconds per token, ``net_low`` is the lower bound of their ratio, the
    net speed-up; None where they were not asked.
    """

    n: int
    champion: float
    candidate: float
    delta: float
    low: float
    high: float
    ahead: float | None = None
    champion_ms: float | None = None
    candidate_ms: float | None = None
    net_low: float | None = None


@dataclass(frozen=True, slots=True)
class GateReport:
    """``speedup`` is predicted over plain decoding, ``net`` over the champion: one request at a time, both under K
    control with the measured costs; None where there are no costs or a class refuses already. ``alpha`` is the level of
    each bound.
    """

    passed: bool
    reasons: tuple[str, ...]
    overall: Comparison | None = None
    classes: Mapping[str, Comparison] | None = None
    speedup: float | None = None
    net: float | None = None
    alpha: float = LEVEL

    def to_json(self) -> dict[str, Any]:
        tree = asdict(self)
        return {**tree, "reasons": list(self.reasons), "classes": tree["classes"] or {}}
