"""Guards as data: what a rollout must not do, written down before it starts and frozen with a hash."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

from engine.contracts import SlipstreamError


class SpecError(SlipstreamError):
    """A rollout specification that cannot start: says which key and what would be right."""


@dataclass(frozen=True, slots=True)
class TokensPerStep:
    """Tokens per verify step, canary against control, over all classes and in each.

    FAIL when it is certain that the canary is worse at all; PASS at the last step when it is certain that it is not
    worse by the share ``max_drop`` of the control. ``pass_alpha`` is the risk of calling a worse canary good enough.
    ``horizon``: request pairs at which the test is sharpest.
    """

    kind: ClassVar[str] = "tokens_per_step"
    rolls_back: ClassVar[bool] = True
    statistical: ClassVar[bool] = True
    max_drop: float = 0.03
    pass_alpha: float = 0.05
    min_requests: int = 20
    horizon: int = 300


@dataclass(frozen=True, slots=True)
class Errors:
    """Assignment keys with an error or timeout: FAIL when it is certain that more of them are the canary's."""

    kind: ClassVar[str] = "errors"
    rolls_back: ClassVar[bool] = True
    statistical: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class LatencyFuse:
    """Absolute: FAIL when the canary's p95 of ``metric`` exceeds ``ratio`` times the control's.

    Both arms share their replicas' batches, so this sees a canary that is slow by itself, not one that slows all.
    """

    kind: ClassVar[str] = "fuse_p95"
    rolls_back: ClassVar[bool] = True
    statistical: ClassVar[bool] = False
    metric: str = "e2e"
    ratio: float = 3.0
    min_requests: int = 200


@dataclass(frozen=True, slots=True)
class SampleRatio:
    """Assignment keys must fall on both arms alike. It only holds: a broken split says nothing about the canary."""

    kind: ClassVar[str] = "srm"
    rolls_back: ClassVar[bool] = False
    statistical: ClassVar[bool] = False
    alpha: float = 0.001


Guard = TokensPerStep | Errors | LatencyFuse | SampleRatio
KINDS: dict[str, type[Guard]] = {kind.kind: kind for kind in (TokensPerStep, Errors, LatencyFuse, SampleRatio)}


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """Durations are seconds, ``steps`` canary weights in (0, 0.5], ascending; the control always weighs the same.

    ``min_requests`` is per arm and step. ``alpha`` is the probability of rolling back an identical canary, split
    evenly over the statistical guards. ``deadline_s`` counts from the first canary traffic.
    """

    steps: tuple[float, ...]
    guards: tuple[Guard, ...]
    min_requests: int = 100
    warmup_s: float = 60.0
    soak_s: float = 300.0
    watch_s: float = 900.0
    deadline_s: float = 14_400.0
    stale_s: float = 120.0
    alpha: float = 0.01
    traffic_classes: tuple[str, ...] | None = None
    preset: str = field(default="")

    def guard_alpha(self) -> float:
        """Bonferroni: the share of ``alpha`` that each statistical guard may spend."""
        return self.alpha / max(1, sum(guard.statistical for guard in self.guards))

    def tokens_per_step(self) -> TokensPerStep | None:
        return next((guard for guard in self.guards if isinstance(guard, TokensPerStep)), None)


PRESETS: dict[str, RolloutSpec] = {
    "cautious": RolloutSpec(
        preset="cautious",
        steps=(0.01, 0.05, 0.1, 0.25, 0.5),
        guards=(TokensPerStep(max_drop=0.02, pass_alpha=0.01, horizon=600), Errors(), LatencyFuse(), SampleRatio()),
        min_requests=300,
        soak_s=3_600.0,
        watch_s=7_200.0,
        deadline_s=172_800.0,
        stale_s=600.0,
    ),
    "standard": RolloutSpec(
        preset="standard",
        steps=(0.1, 0.25, 0.5),
        guards=(TokensPerStep(), Errors(), LatencyFuse(), SampleRatio()),
    ),
    "fast": RolloutSpec(
        preset="fast",
        steps=(0.3, 0.5),
        guards=(
            TokensPerStep(max_drop=0.05, min_requests=12, horizon=60),
            Errors(),
            LatencyFuse(metric="tpot", min_requests=60),
            SampleRatio(),
        ),
        min_requests=25,
        warmup_s=4.0,
        soak_s=5.0,
        watch_s=10.0,
        deadline_s=900.0,
        stale_s=45.0,
    ),
}
"""``fast`` decides in minutes at two requests a second; it risks no more false rollbacks, it only finds less."""


def preset(name: str, traffic_classes: Sequence[str] | None = None) -> RolloutSpec:
    if name not in PRESETS:
        raise SpecError(f"There is no preset {name!r}; there are {', '.join(PRESETS)}.")
    classes = tuple(sorted(set(traffic_classes))) if traffic_classes else None
    return validate(replace(PRESETS[name], traffic_classes=classes))


def to_dict(spec: RolloutSpec) -> dict[str, Any]:
    """The specification as JSON has it: what is stored, hashed and parsed again."""
    tree = {f.name: getattr(spec, f.name) for f in fields(spec)}
    tree["guards"] = [{"kind": guard.kind, **asdict(guard)} for guard in spec.guards]
    return dict(json.loads(json.dumps(tree)))


def parse(tree: Mapping[str, Any]) -> RolloutSpec:
    """A specification from JSON or YAML, strictly: an unknown key is an error that names the nearest known one."""
    values = _known(RolloutSpec, tree, "rollout")
    guards = values.get("guards")
    if not isinstance(guards, (list, tuple)):
        raise SpecError(f"rollout.guards must be a list of guards, got {guards!r}.")
    values["guards"] = tuple(_guard(entry, f"rollout.guards[{i}]") for i, entry in enumerate(guards))
    for name in ("steps", "traffic_classes"):
        value = values.get(name)
        if value is not None:
            if not isinstance(value, (list, tuple)):
                raise SpecError(f"rollout.{name} must be a list, got {value!r}.")
            values[name] = tuple(value)
    return validate(RolloutSpec(**values))


def validate(spec: RolloutSpec) -> RolloutSpec:
    """The same specification, or a SpecError for the first thing that is wrong with it."""
    numbers = [(f.name, getattr(spec, f.name)) for f in fields(spec) if f.type in ("int", "float")]
    numbers += [("step", weight) for weight in spec.steps]
    numbers += [
        (f"{guard.kind}.{f.name}", getattr(guard, f.name))
        for guard in spec.guards
        for f in fields(guard)
        if f.type in ("int", "float")
    ]
    for name, value in numbers:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise SpecError(f"rollout.{name} must be a number that is not negative, got {value!r}.")
    if not spec.steps or any(not 0 < w <= 0.5 for w in spec.steps) or list(spec.steps) != sorted(set(spec.steps)):
        raise SpecError(
            f"rollout.steps must be ascending weights above 0 and at most 0.5 (the control takes as much as the "
            f"canary), got {list(spec.steps)}."
        )
    if not any(guard.rolls_back for guard in spec.guards):
        raise SpecError(
            "A rollout without rollback conditions cannot start: add a guard of kind "
            + ", ".join(name for name, kind in KINDS.items() if kind.rolls_back)
            + "."
        )
    kinds = [guard.kind for guard in spec.guards]
    if len(set(kinds)) != len(kinds):
        raise SpecError(f"rollout.guards has a kind twice: {kinds}.")
    if spec.tokens_per_step() is None:
        raise SpecError("A rollout needs a guard of kind tokens_per_step: it is what lets the last step PASS.")
    if not 0 < spec.alpha < 0.5 or spec.min_requests < 1 or not spec.deadline_s > spec.warmup_s:
        raise SpecError("rollout: alpha lies in (0, 0.5), min_requests is at least 1, deadline_s exceeds warmup_s.")
    for guard in spec.guards:
        if isinstance(guard, LatencyFuse) and guard.metric not in ("e2e", "ttft", "tpot"):
            raise SpecError(f"rollout.fuse_p95.metric is one of e2e, ttft, tpot, got {guard.metric!r}.")
        if isinstance(guard, TokensPerStep) and not (0 < guard.pass_alpha < 0.5 and guard.horizon >= 1):
            raise SpecError("rollout.tokens_per_step: pass_alpha lies in (0, 0.5) and horizon is at least 1.")
    return spec


def spec_hash(spec: RolloutSpec) -> str:
    """sha256 over the specification: whoever changes a guard after launch is found out."""
    return tree_hash(to_dict(spec))


def tree_hash(tree: Mapping[str, Any]) -> str:
    """The hash of a specification as it is stored; a later version of the code does not change it."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _guard(tree: Any, where: str) -> Guard:
    if not isinstance(tree, Mapping) or tree.get("kind") not in KINDS:
        kind = tree.get("kind") if isinstance(tree, Mapping) else tree
        raise SpecError(f"{where} needs a kind, one of {', '.join(KINDS)}; got {kind!r}.")
    kind_class = KINDS[tree["kind"]]
    return kind_class(**_known(kind_class, {k: v for k, v in tree.items() if k != "kind"}, where))


def _known(kind: type, tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = {f.name: f for f in fields(kind)}
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            raise SpecError(
                f"Unknown key {where}.{key}."
                + (f" Did you mean {near[0]}?" if near else f" Known: {', '.join(known)}.")
            )
    for name, f in known.items():
        if f.default is MISSING and f.default_factory is MISSING and name not in tree:
            raise SpecError(f"{where}.{name} is missing.")
    return dict(tree)
