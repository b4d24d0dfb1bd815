"""Canary and control, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.contracts import CANARY, CONTROL
from engine.rollout import quantiles
from engine.rollout.quantiles import Array
from engine.store.segments import Segment

ALL = "all"


@dataclass(frozen=True, slots=True)
class Arms:
    """Canary and control, aligned: entry 0 is all classes together, then each class that either arm has seen."""

    names: tuple[str, ...]
    canary: tuple[Segment, ...]
    control: tuple[Segment, ...]
    histograms: dict[str, Array] = field(default_factory=dict)
    """The running sums of both arms' latencies by metric, made when the first guard asks for them."""

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Arms:
        found = {(s.arm, s.traffic_class or ALL): s for s in segments}
        classes = sorted({name for _, name in found} - {ALL})
        names = (ALL, *classes)
        canary, control = (
            tuple(found.get((arm, name)) or Segment(arm, None if name == ALL else name) for name in names)
            for arm in (CANARY, CONTROL)
        )
        return cls(names, canary, control)

    def sums(self, metric: str) -> Array:
        if metric not in self.histograms:
            arms = ([s.latencies.get(metric, ((), ())) for s in arm] for arm in (self.canary, self.control))
            self.histograms[metric] = quantiles.dense(*arms)
        return self.histograms[metric]

    def worst(self, log_e: Array) -> int:
        return int(log_e.argmax())
