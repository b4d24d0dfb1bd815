"""Specifications of rollouts, read strictly from JSON, YAML or a preset, and frozen under a hash."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, replace
from functools import cache
from importlib import resources
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from engine.rollout.guards import KINDS, LEAST_ALPHA, RULES, Guard, RolloutSpec, Shadow, SpecError

PRESETS = ("cautious", "standard", "fast")
LONGEST_S, MOST_REQUESTS = 365 * 86_400, 10_000_000
LISTS = ("steps", "traffic_classes", "tenants", "slices")


def preset(name: str, traffic_classes: Sequence[str] | None = None) -> RolloutSpec:
    """A specification that ships: ``engine/rollout/presets/NAME.yaml``."""
    classes = tuple(sorted(set(traffic_classes))) if traffic_classes else None
    return validate(replace(_shipped(name), traffic_classes=classes))


def preset_text(name: str) -> str:
    """A preset as its file has it: something to start a file of one's own from."""
    if name not in PRESETS:
        raise SpecError(f"There is no preset {name!r}; there are {', '.join(PRESETS)}.")
    return (resources.files("engine.rollout.presets") / f"{name}.yaml").read_text()


@cache
def _shipped(name: str) -> RolloutSpec:
    return read(preset_text(name) + f"\npreset: {name}\n", f"{name}.yaml")


def read_file(path: Path) -> RolloutSpec:
    """The specification of a YAML (or JSON) file; SpecError where there is none or something in it is wrong."""
    try:
        return read(path.read_text(), str(path))
    except FileNotFoundError:
        raise SpecError(
            f"There is no file {path}. `slipstream rollout preset standard > {path}` gives one to start from."
        ) from None


def read(text: str, source: str) -> RolloutSpec:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{source} is not valid YAML: {error}") from None
    if not isinstance(tree, Mapping):
        raise SpecError(f"{source} must hold keys such as steps and guards, got {type(tree).__name__}.")
    return parse(tree)


def to_dict(spec: RolloutSpec) -> dict[str, Any]:
    """The specification as JSON has it: what is stored, hashed and parsed again."""
    tree = {f.name: getattr(spec, f.name) for f in fields(spec)}
    tree["guards"] = [{"kind": guard.kind, **asdict(guard)} for guard in spec.guards]
    tree["shadow"] = asdict(spec.shadow) if spec.shadow is not None else None
    return dict(json.loads(json.dumps(tree)))


def to_yaml(spec: RolloutSpec) -> str:
    """The specification as a file that ``read`` gives back unchanged: one line a key, one line a guard."""
    tree = to_dict(spec)
    guards = tree.pop("guards")
    lines = [
        f"{name}: {yaml.safe_dump(value, default_flow_style=True, width=1_000).splitlines()[0]}"
        for name, value in tree.items()
        if value is not None and value != ""
    ]
    lines += ["guards:", *(f"  - {yaml.safe_dump(g, default_flow_style=True, width=1_000).strip()}" for g in guards)]
    return "\n".join(lines) + "\n"


def parse(tree: Mapping[str, Any]) -> RolloutSpec:
    """A specification from JSON or YAML, strictly: an unknown key is an error that names the nearest known one."""
    values = _known(RolloutSpec, tree, "rollout")
    guards = values.get("guards")
    if not isinstance(guards, (list, tuple)):
        raise SpecError(f"rollout.guards must be a list of guards, got {guards!r}.")
    values["guards"] = tuple(_guard(entry, f"rollout.guards[{i}]") for i, entry in enumerate(guards))
    if values.get("shadow") is not None:
        if not isinstance(values["shadow"], Mapping):
            raise SpecError(f"rollout.shadow must be keys such as requests, got {values['shadow']!r}.")
        values["shadow"] = Shadow(**_known(Shadow, values["shadow"], "rollout.shadow"))
    for name in LISTS:
        value = values.get(name)
        if value is not None:
            if not isinstance(value, (list, tuple)):
                raise SpecError(f"rollout.{name} must be a list, got {value!r}.")
            values[name] = tuple(value)
    return validate(RolloutSpec(**values))


def thaw(tree: Mapping[str, Any]) -> RolloutSpec:
    """A specification as it was stored: judged by the rules of its time, the first where it does not name them."""
    return parse({"rules": 1, **tree})


def validate(spec: RolloutSpec) -> RolloutSpec:
    """The same specification, or a SpecError for the first thing that is wrong with it."""
    for name, kind, value in _numbers(spec):
        _check_number(name, kind, value)
    for name in ("traffic_classes", "tenants", "slices"):
        said = getattr(spec, name)
        if said is not None and not (said and all(isinstance(one, str) and one for one in said)):
            raise SpecError(f"rollout.{name} must be a list of names, or absent for everybody's; got {list(said)}.")
    if not spec.steps or any(not 0 < w <= 0.5 for w in spec.steps) or list(spec.steps) != sorted(set(spec.steps)):
        raise SpecError(
            f"rollout.steps must be ascending weights above 0 and at most 0.5 (the control takes as much as the "
            f"canary), got {list(spec.steps)}."
        )
    if spec.holdback > 0.5 or (spec.watch_s > 0 and not spec.holdback):
        raise SpecError(
            "rollout.holdback is at most 0.5, the weight of a control, and above 0 while watch_s is: a champion is "
            f"watched beside the one before; got {spec.holdback:g}."
        )
    if not 0 < spec.watch_share < 1:
        raise SpecError(f"rollout.watch_share lies between 0 and 1, a share of alpha; got {spec.watch_share:g}.")
    if not (0 < spec.shadow_share < 1 and spec.watch_share + spec.shadow_share < 1):
        raise SpecError(
            "rollout.shadow_share is a share of alpha above 0 that leaves, with watch_share, some for the trial; got "
            f"{spec.shadow_share:g} and {spec.watch_share:g}."
        )
    if spec.shadow is not None and not (type(spec.shadow.requests) is int and spec.shadow.requests >= 1):
        raise SpecError(f"rollout.shadow.requests must be a whole number of at least 1, got {spec.shadow.requests!r}.")
    if spec.rules not in range(1, RULES + 1):
        raise SpecError(f"rollout.rules is the version of the rules that judge, 1 to {RULES}; got {spec.rules!r}.")
    if not any(guard.rolls_back for guard in spec.guards):
        raise SpecError(
            "A rollout without rollback conditions cannot start: add a guard of kind "
            + ", ".join(name for name, kind in KINDS.items() if kind.rolls_back)
            + "."
        )
    for guard in spec.guards:
        if (fault := guard.fault()) is not None:
            raise SpecError(f"rollout.{guard.kind}: {fault}")
    names = [guard.name for guard in spec.guards]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SpecError(f"rollout.guards has a guard twice: {', '.join(twice)}.")
    if spec.tokens_per_step() is None:
        raise SpecError("A rollout needs a guard of kind tokens_per_step: it is what lets the last step PASS.")
    if not LEAST_ALPHA <= spec.alpha < 0.5 or spec.min_requests < 1 or not spec.deadline_s > spec.warmup_s:
        raise SpecError(
            f"rollout: alpha lies in [{LEAST_ALPHA:g}, 0.5), min_requests is at least 1, deadline_s exceeds warmup_s."
        )
    return spec


def _numbers(spec: RolloutSpec) -> Iterator[tuple[str, object, Any]]:
    """(name, declared type, value) of every number in a specification."""
    for f in fields(spec):
        yield f.name, f.type, getattr(spec, f.name)
    yield from (("step", "float", weight) for weight in spec.steps)
    for guard in spec.guards:
        yield from ((f"{guard.kind}.{f.name}", f.type, getattr(guard, f.name)) for f in fields(guard))


def _check_number(name: str, kind: object, value: Any) -> None:
    """Numbers of any size pass no further: what never ends or never has enough is a guard taken away."""
    if kind not in ("int", "float"):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (isfinite(value) and value >= 0):
        raise SpecError(f"rollout.{name} must be a number that is finite and not negative, got {value!r}.")
    if kind == "int" and (value != int(value) or value > MOST_REQUESTS):
        raise SpecError(f"rollout.{name} must be a whole number of at most {MOST_REQUESTS:,}, got {value!r}.")
    if name.endswith("_s") and value > LONGEST_S:
        raise SpecError(f"rollout.{name} is at most {LONGEST_S:,} s, a year; got {value!r}.")


def spec_hash(spec: RolloutSpec) -> str:
    """sha256 over the specification: whoever changes a guard after launch is found out."""
    return tree_hash(to_dict(spec))


def tree_hash(tree: Mapping[str, Any]) -> str:
    """The hash of a specification as it is stored; a later version of the code does not change it."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _guard(tree: Any, where: str) -> Guard:
    kind = tree.get("kind") if isinstance(tree, Mapping) else tree
    if not isinstance(tree, Mapping) or kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise SpecError(f"{where} needs a kind, one of {', '.join(KINDS)}; got {kind!r}.{hint}")
    kind_class = KINDS[tree["kind"]]
    return kind_class(**_known(kind_class, {k: v for k, v in tree.items() if k != "kind"}, where))


def _known(kind: type, tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = {f.name: f for f in fields(kind)}
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            raise SpecError(
                f"Unknown key {where}.{key}."
                + (f" Did you mean {near[0]}?" if near else f" Known: {', '.join(known) or 'none'}.")
            )
    for name, f in known.items():
        if f.default is MISSING and f.default_factory is MISSING and name not in tree:
            raise SpecError(f"{where}.{name} is missing.")
    return dict(tree)
