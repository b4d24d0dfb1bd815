"""A request's arm is a pure, stable, uniform function of its key."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.contracts import CANARY, CHAMPION, CONTROL, Arm, ServingPlan
from engine.routing import assign, bucket, without


def plan(weight: float, classes: frozenset[str] | None = None) -> ServingPlan:
    return ServingPlan(
        generation=7,
        champion=1,
        fallback=0,
        arms=(Arm(CANARY, 2, weight), Arm(CONTROL, 1, weight)),
        salt="s",
        actor="t",
        reason="t",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        traffic_classes=classes,
    )


@given(st.text(), st.text())
def test_buckets_lie_in_the_unit_interval(salt: str, key: str) -> None:
    assert 0.0 <= bucket(salt, key) < 1.0


@pytest.mark.parametrize(
    ("limits", "asked", "taken"),
    [
        ({"tenants": frozenset({"acme"})}, ("chat", "acme", None), True),
        ({"tenants": frozenset({"acme"})}, ("chat", "other", None), False),
        ({"tenants": frozenset({"acme"})}, ("chat", None, None), False),
        ({"slices": frozenset({"staff"})}, ("chat", None, "staff"), True),
        ({"slices": frozenset({"staff"})}, ("chat", None, "public"), False),
        ({"slices": frozenset({"staff"}), "tenants": frozenset({"acme"})}, ("chat", "acme", None), False),
        ({"traffic_classes": frozenset({"code"})}, ("chat", "acme", "staff"), False),
        ({}, ("chat", None, None), True),
    ],
)
def test_a_slice_takes_whom_it_names(limits: dict, asked: tuple, taken: bool) -> None:  # type: ignore[type-arg]
    sliced, (traffic_class, tenant, name) = replace(plan(0.5), **limits), asked
    arms = {assign(sliced, str(key), traffic_class, False, tenant, name).arm for key in range(50)}
    assert arms == ({CANARY, CONTROL} if taken else {CHAMPION})


@given(st.text(), st.floats(0.01, 0.49))
def test_a_key_keeps_its_arm_while_weights_grow(key: str, weight: float) -> None:
    before = assign(plan(weight), key, "chat").arm
    after = assign(plan(0.5), key, "chat").arm
    assert before in (CHAMPION, after)


@pytest.mark.parametrize("weight", [0.1, 0.25, 0.5])
def test_canary_and_control_get_equal_shares(weight: float) -> None:
    n = 20_000
    arms = Counter(assign(plan(weight), str(key), "chat").arm for key in range(n))
    spread = 4 * (n * weight * (1 - weight)) ** 0.5  # four standard deviations of a binomial
    assert abs(arms[CANARY] - n * weight) < spread
    assert abs(arms[CONTROL] - n * weight) < spread


def test_half_and_half_leaves_nobody_out() -> None:
    assert {assign(plan(0.5), str(key), "chat").arm for key in range(1_000)} == {CANARY, CONTROL}


def test_other_classes_stay_with_the_champion() -> None:
    only_code = plan(0.5, frozenset({"code"}))
    assert {assign(only_code, str(key), "chat").arm for key in range(100)} == {CHAMPION}
    assert CANARY in {assign(only_code, str(key), "code").arm for key in range(100)}


def test_an_expired_lease_sends_everybody_to_the_champion() -> None:
    given_out = {assign(plan(0.5), str(key), "chat", lease_expired=True) for key in range(100)}
    assert {(a.arm, a.policy_version) for a in given_out} == {(CHAMPION, 1)}


def test_salts_are_independent() -> None:
    keys = [str(key) for key in range(20_000)]
    first = {k for k in keys if bucket("a", k) < 0.5}
    both = sum(bucket("b", k) < 0.5 for k in first)
    assert abs(both - len(first) / 2) < 4 * (len(first) / 4) ** 0.5


def test_the_generation_is_on_the_assignment() -> None:
    assert assign(replace(plan(0.1), generation=9), "k", "chat").generation == 9


@pytest.mark.parametrize(
    ("unloadable", "champion", "arms"),
    [
        ((), 1, 2),
        ((9,), 1, 2),  # another plan's
        ((2,), 1, 0),
        ((0,), 1, 0),  # a champion without its stand-in takes no risks
        ((1,), 0, 0),
        ((1, 0), -1, 0),
    ],
)
def test_what_cannot_be_loaded_is_stood_in_for(unloadable: tuple[int, ...], champion: int, arms: int) -> None:
    served = without(plan(0.5), frozenset(unloadable), plain=-1)
    assert (served.generation, served.champion, len(served.arms)) == (7, champion, arms)
