"""Guards as data: what a rollout must not do, written down before it starts. ``specs`` reads, checks, hashes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from engine.contracts import SlipstreamError
from engine.store.segments import METRICS

METHODS = ("fast", "certified")
RULES = 3
"""Which rules judge, frozen with the specification so that a replay judges by those of its time. Since 2 the spacing of
a fast latency guard looks to one side as well, a fuse allows for chance, and what a shadow may spend of ``alpha`` is
set aside: it spent the trial's again. Since 3 a watch waits for ``min_requests``, and a fast latency guard judges by a
likelihood ratio instead of spacings.
"""
LEAST_ALPHA = 1e-6
"""Below it a guard needs so much evidence that it is none."""
MAX_RESTARTS = 20
"""Restarts that are remembered; a fuse that allows more is no fuse."""


class SpecError(SlipstreamError):
    """A rollout specification that cannot start: says which key and what would be right."""


@dataclass(frozen=True, slots=True)
class _Guard:
    """What all guards have. ``rolls_back``: whether a FAIL takes the canary back; ``statistical``: whether it spends a
    share of the rollout's ``alpha``."""

    kind: ClassVar[str] = ""
    rolls_back: ClassVar[bool] = True
    statistical: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return self.kind

    def fault(self) -> str | None:
        """What is wrong with its settings."""
        return None


@dataclass(frozen=True, slots=True)
class TokensPerStep(_Guard):
    """Tokens per verify step, canary against control, over all classes and in each.

    FAIL when it is certain that the canary is worse at all; PASS at the last step when it is certain that it is not
    worse by the share ``max_drop`` of the control. ``pass_alpha`` is the risk of calling a worse canary good enough.
    ``min_requests`` are assignment keys per arm, and ``horizon`` the pairs of them at which the test is sharpest: the
    key was randomised, and ten requests of one conversation are one observation. A key weighs one, however many steps
    it took: what is compared is the mean over keys of their tokens per verify step.
    """

    kind: ClassVar[str] = "tokens_per_step"
    statistical: ClassVar[bool] = True
    max_drop: float = 0.03
    pass_alpha: float = 0.05
    min_requests: int = 20
    horizon: int = 300

    def fault(self) -> str | None:
        if not (0 < self.pass_alpha < 0.5 and self.horizon >= 1):
            return "pass_alpha lies in (0, 0.5) and horizon is at least 1."
        if self.max_drop >= 1:
            return f"max_drop is a share of the control's tokens per step, below 1; got {self.max_drop:g}."
        return None


@dataclass(frozen=True, slots=True)
class Latency(_Guard):
    """FAIL when it is certain that the canary's ``quantile`` of ``metric`` exceeds (1 + ``margin``) × the control's.

    ``method``: certified (an e-process, valid by a theorem) or fast (sharper in the tail, calibrated on equal arms).
    Both arms share their replicas' batches: this sees a canary that is slow by itself, not one that slows everybody.
    A key weighs one, however many requests it brought, and ``horizon`` counts keys.
    """

    kind: ClassVar[str] = "latency"
    statistical: ClassVar[bool] = True
    metric: str = "e2e"
    quantile: float = 0.95
    margin: float = 0.05
    method: str = "fast"
    horizon: int = 300

    @property
    def name(self) -> str:
        return f"{self.metric}_p{self.quantile * 100:g}"

    def fault(self) -> str | None:
        if self.metric not in METRICS:
            return f"metric is one of {', '.join(METRICS)}, got {self.metric!r}."
        if self.method not in METHODS:
            return f"method is one of {', '.join(METHODS)}, got {self.method!r}."
        if not 0.01 <= self.quantile <= 0.999 or self.horizon < 1:
            return f"quantile lies in [0.01, 0.999] and horizon is at least 1, got {self.quantile} and {self.horizon}."
        if self.margin > 1:
            return f"margin is a share of the control's latency, at most 1 (twice as slow); got {self.margin:g}."
        return None


@dataclass(frozen=True, slots=True)
class _Events(_Guard):
    """Assignment keys that met an event: FAIL when it is certain that more of them are the canary's."""

    statistical: ClassVar[bool] = True
    kind: ClassVar[str] = ""
    counted: ClassVar[str] = ""
    """The field of a Segment that counts the keys."""


@dataclass(frozen=True, slots=True)
class Errors(_Events):
    """Requests that ended in an error, or whose draft failed: the engine goes on without it, and it is an error of the
    policy all the same. In shadow only the draft can fail."""

    kind: ClassVar[str] = "errors"
    counted: ClassVar[str] = "error_keys"


@dataclass(frozen=True, slots=True)
class Timeouts(_Events):
    """Requests that ran past their time: what hangs."""

    kind: ClassVar[str] = "timeouts"
    counted: ClassVar[str] = "timeout_keys"


@dataclass(frozen=True, slots=True)
class Retries(_Events):
    """Requests that a client sent again."""

    kind: ClassVar[str] = "retries"
    counted: ClassVar[str] = "retry_keys"


@dataclass(frozen=True, slots=True)
class Mismatches(_Events):
    """Greedy outputs that are not the target's own, found by the auditor, beyond ties."""

    kind: ClassVar[str] = "mismatches"
    counted: ClassVar[str] = "mismatches"


def _ratio_fault(ratio: float) -> str | None:
    return None if 1 < ratio <= 100 else f"ratio lies in (1, 100], times the control's; got {ratio:g}."


@dataclass(frozen=True, slots=True)
class LatencyFuse(_Guard):
    """Absolute: FAIL when the canary's p95 of ``metric`` exceeds ``ratio`` times the control's, over ``min_requests``
    assignment keys of each arm, and by more than the ranks of both can be wrong by chance."""

    kind: ClassVar[str] = "fuse_p95"
    metric: str = "e2e"
    ratio: float = 3.0
    min_requests: int = 200

    def fault(self) -> str | None:
        if self.metric not in METRICS:
            return f"metric is one of {', '.join(METRICS)}, got {self.metric!r}."
        return _ratio_fault(self.ratio)


@dataclass(frozen=True, slots=True)
class CostFuse(_Guard):
    """Absolute: FAIL when the canary's median cost of a token exceeds ``ratio`` times the control's, over
    ``min_requests`` assignment keys of each arm: a draft that is slow shows here, however it slows everybody."""

    kind: ClassVar[str] = "fuse_cost"
    metric: ClassVar[str] = "cost"
    ratio: float = 1.5
    min_requests: int = 200

    def fault(self) -> str | None:
        return _ratio_fault(self.ratio)


@dataclass(frozen=True, slots=True)
class MismatchFuse(_Guard):
    """Absolute: FAIL at the first output of the canary that is not the target's own. Drafts never change an output."""

    kind: ClassVar[str] = "fuse_mismatch"


@dataclass(frozen=True, slots=True)
class RestartFuse(_Guard):
    """Absolute: FAIL when replicas start again ``restarts`` times within ``window_s`` while the canary serves."""

    kind: ClassVar[str] = "fuse_restarts"
    restarts: int = 2
    window_s: float = 300.0

    def fault(self) -> str | None:
        if not 1 <= self.restarts <= MAX_RESTARTS:
            return f"restarts lies in [1, {MAX_RESTARTS}], got {self.restarts}."
        return None if self.window_s > 0 else "window_s is above 0."


@dataclass(frozen=True, slots=True)
class SampleRatio(_Guard):
    """Assignment keys must fall on both arms alike. It only holds: a broken split says nothing about the canary."""

    kind: ClassVar[str] = "srm"
    rolls_back: ClassVar[bool] = False
    alpha: float = 0.001

    def fault(self) -> str | None:
        return None if LEAST_ALPHA <= self.alpha < 0.5 else f"alpha lies in [{LEAST_ALPHA:g}, 0.5)."


@dataclass(frozen=True, slots=True)
class Shadow:
    """Before the first weight: the canary drafts on copies of this many served requests and serves none.

    It goes on when neither ``tokens_per_step`` nor ``errors`` fails on them, champion against canary over the same
    requests.
    """

    requests: int = 200


Events = Errors | Timeouts | Retries | Mismatches
Guard = TokensPerStep | Latency | Events | LatencyFuse | CostFuse | MismatchFuse | RestartFuse | SampleRatio
KINDS: dict[str, type[Guard]] = {
    kind.kind: kind
    for kind in (
        *(TokensPerStep, Latency, Errors, Timeouts, Retries, Mismatches),
        *(LatencyFuse, CostFuse, MismatchFuse, RestartFuse, SampleRatio),
    )
}


IN_SHADOW = (TokensPerStep.kind, Errors.kind)
"""The guards that can say something of a canary that serves nobody."""


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """Durations are seconds, ``steps`` canary weights in (0, 0.5], ascending; the control always weighs the same.

    ``min_requests`` is per arm and step. ``alpha`` is the probability of rolling back an identical canary, split
    evenly over the statistical guards. ``deadline_s`` counts from the first canary traffic, and before it from the
    start that was asked for. ``blind_s`` is how long a canary may serve while its traffic cannot be measured or its
    traces do not come, ``promote_s`` how long a promotion may wait for replicas to follow; beyond either the champion
    is back and nobody is blamed. A new champion is watched for ``watch_s``, and until ``min_requests`` of each arm came
    (``deadline_s`` at most); meanwhile the one before keeps the share ``holdback`` as its control, and ``watch_share``
    of ``alpha`` is kept for that time.
    ``traffic_classes``, ``tenants`` and ``slices`` (the header X-Slice) say whose requests may be tried at all; None is
    everybody's.
    ``shadow`` comes before the first step, and has ``deadline_s`` of its own and ``shadow_share`` of ``alpha``.
    """

    steps: tuple[float, ...]
    guards: tuple[Guard, ...]
    min_requests: int = 100
    warmup_s: float = 60.0
    soak_s: float = 300.0
    watch_s: float = 900.0
    deadline_s: float = 14_400.0
    stale_s: float = 120.0
    blind_s: float = 600.0
    promote_s: float = 600.0
    holdback: float = 0.1
    alpha: float = 0.01
    watch_share: float = 0.2  # of every rollout that was frozen before this could be set
    traffic_classes: tuple[str, ...] | None = None
    tenants: tuple[str, ...] | None = None
    slices: tuple[str, ...] | None = None
    shadow: Shadow | None = None
    shadow_share: float = 0.1
    rules: int = RULES
    preset: str = field(default="")

    def limits(self) -> tuple[str, ...]:
        """Whose requests are tried, where that is not everybody's."""
        return (*(self.traffic_classes or ()), *(self.tenants or ()), *(self.slices or ()))

    def guard_alpha(self, watching: bool = False) -> float:
        """Bonferroni: the share of ``alpha`` that each statistical guard may spend before and after the promotion.

        Watching is a comparison of its own: a canary that was better for an hour must not live on its past. So is a
        shadow, whose share is set aside where there is one.
        """
        aside = self.shadow_share if self.shadow is not None and self.rules > 1 else 0.0
        share = self.watch_share if watching else 1.0 - self.watch_share - aside
        return share * self.alpha / max(1, sum(guard.statistical for guard in self.guards))

    def shadow_alpha(self) -> float:
        """What each guard that judges in shadow may spend there."""
        if self.rules == 1:
            return self.guard_alpha()
        return self.shadow_share * self.alpha / max(1, sum(guard.kind in IN_SHADOW for guard in self.guards))

    def tokens_per_step(self) -> TokensPerStep | None:
        return next((guard for guard in self.guards if isinstance(guard, TokensPerStep)), None)

    def metrics(self) -> tuple[str, ...]:
        """The latencies that some guard looks at."""
        return tuple(
            sorted({guard.metric for guard in self.guards if isinstance(guard, Latency | LatencyFuse | CostFuse)})
        )
