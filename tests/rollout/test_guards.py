"""A specification is strict, hashed, and never without a way back."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan

import pytest

from engine.rollout import specs
from engine.rollout.guards import RolloutSpec, SampleRatio, SpecError, TokensPerStep


@pytest.mark.parametrize("name", specs.PRESETS)
def test_a_preset_survives_json_and_keeps_its_hash(name: str) -> None:
    spec = specs.preset(name)
    again = specs.thaw(specs.to_dict(spec))
    assert again == spec
    assert specs.spec_hash(again) == specs.spec_hash(spec)


def test_no_preset_risks_more_false_rollbacks_than_another() -> None:
    for spec in map(specs.preset, specs.PRESETS):
        assert spec.alpha == 0.01
        spent = spec.guard_alpha() + spec.guard_alpha(watching=True)
        spent *= sum(guard.statistical for guard in spec.guards)
        assert spent + 2 * spec.shadow_alpha() * (spec.shadow is not None) == pytest.approx(0.01)


def test_every_change_of_a_guard_changes_the_hash() -> None:
    spec = specs.preset("standard")
    looser = replace(spec, guards=(TokensPerStep(max_drop=0.5), *spec.guards[1:]))
    assert specs.spec_hash(looser) != specs.spec_hash(spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepps": [0.1]}, "rollout.stepps. Did you mean steps"),
        ({"guards": [{"kind": "srm"}]}, "without rollback conditions"),
        ({"guards": []}, "without rollback conditions"),
        ({"guards": [{"kind": "errors"}]}, "needs a guard of kind tokens_per_step"),
        ({"guards": [{"kind": "tokens_per_step", "max_dorp": 0.1}]}, "Did you mean max_drop"),
        ({"guards": [{"kind": "latancy"}]}, "needs a kind, one of .* Did you mean latency"),
        ({"guards": [{"kind": "latency", "metric": "queue"}]}, "metric is one of e2e, ttft, tpot"),
        ({"guards": [{"kind": "latency"}, {"kind": "latency", "margin": 0.2}]}, "a guard twice: e2e_p95"),
        ({"steps": [0.5, 0.25]}, "ascending"),
        ({"steps": [0.6]}, "at most 0.5"),
        ({"steps": []}, "ascending"),
        ({"warmup_s": -1}, "warmup_s must be a number that is finite and not negative"),
        ({"min_requests": "many"}, "min_requests must be a number"),
        ({"alpha": 0.7}, "alpha lies in"),
        ({"alpha": 1e-300}, "alpha lies in"),
        ({"stale_s": inf}, "stale_s must be a number that is finite"),
        ({"stale_s": nan}, "stale_s must be a number that is finite"),
        ({"deadline_s": 1e300}, "deadline_s is at most 31,536,000 s, a year"),
        ({"min_requests": 1.5}, "min_requests must be a whole number"),
        ({"min_requests": 10**12}, "min_requests must be a whole number of at most"),
        ({"holdback": 0}, "above 0 while watch_s is"),
        ({"traffic_classes": [3]}, "traffic_classes must be a list of names"),
        ({"tenants": []}, "tenants must be a list of names, or absent"),
        ({"guards": [{"kind": "tokens_per_step", "max_drop": 5}]}, "max_drop is a share"),
        ({"guards": [{"kind": "tokens_per_step", "horizon": 0.5}]}, "horizon must be a whole number"),
        ({"guards": [{"kind": "latency", "margin": 1e9}]}, "margin is a share"),
        ({"guards": [{"kind": "fuse_p95", "ratio": 1e9}]}, r"ratio lies in \(1, 100\]"),
        ({"guards": [{"kind": "fuse_cost", "ratio": 0}]}, r"ratio lies in \(1, 100\]"),
        ({"guards": [{"kind": "fuse_restarts", "restarts": 50}]}, r"restarts lies in \[1, 20\]"),
        ({"guards": [{"kind": "errors"}, {"kind": "srm", "alpha": 1e-300}]}, "alpha lies in"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        specs.parse(specs.to_dict(specs.preset("fast")) | change)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(SpecError, match=r"rollout\.steps is missing"):
        specs.parse({"guards": [{"kind": "errors"}]})


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(SpecError, match="cautious, standard, fast"):
        specs.preset("reckless")


def test_a_spec_built_in_code_is_validated_as_well() -> None:
    with pytest.raises(SpecError, match="without rollback conditions"):
        specs.validate(RolloutSpec(steps=(0.5,), guards=(SampleRatio(),)))


def test_what_was_frozen_before_is_judged_by_the_rules_of_its_time() -> None:
    spec = specs.preset("cautious")
    stored = {name: value for name, value in specs.to_dict(spec).items() if name != "rules"}
    assert specs.parse(stored) == spec
    assert specs.thaw(stored) == replace(spec, rules=1)
    assert specs.thaw(specs.to_dict(spec)) == spec
    with pytest.raises(SpecError, match=r"rollout.rules is the version"):
        specs.parse(stored | {"rules": 4})
