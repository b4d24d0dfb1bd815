"""What a guard still needs comes true when the traffic goes on as it looks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.contracts import CANARY, CONTROL, Verdict
from engine.rollout import explain, specs
from engine.rollout.evaluate import evaluate
from engine.rollout.explain import Outlook
from engine.rollout.records import GuardResult
from engine.store.segments import Segment
from tests.rollout.world import segment

SPEC = specs.preset("standard")


def judged(n: int, canary: float, errors: int = 0, noise: float = 0.4, control: float = 2.0) -> dict[str, GuardResult]:
    pair: list[Segment] = [
        segment(CANARY, n, canary, errors=errors, noise=noise),
        segment(CONTROL, n, control, noise=noise),
    ]
    return {g.guard: g for g in evaluate(SPEC, pair)}


@pytest.mark.parametrize(("canary", "verdict"), [(2.02, Verdict.PASS), (1.9, Verdict.FAIL)])
def test_tokens_per_step_decides_where_it_was_said_to(canary: float, verdict: Verdict) -> None:
    early = judged(60, canary)["tokens_per_step"]
    assert early.verdict is Verdict.INSUFFICIENT
    seen = explain.outlook(SPEC, early, rate=2.0)
    assert seen.verdict is verdict
    assert seen.requests is not None
    assert seen.minutes == pytest.approx(seen.requests / 120)
    late = judged(60 + round(1.15 * seen.requests), canary)["tokens_per_step"]
    assert late.verdict is verdict
    assert judged(60 + round(0.7 * seen.requests), canary)["tokens_per_step"].verdict is not verdict


def test_events_decide_when_evidence_has_grown_in_proportion() -> None:
    early = judged(100, 2.0, errors=6)["errors"]
    assert early.verdict is Verdict.PASS
    seen = explain.outlook(SPEC, early, rate=0.0)
    assert (seen.verdict, seen.minutes) == (Verdict.FAIL, None)
    assert seen.requests is not None
    factor = (100 + seen.requests) / 100
    assert judged(round(100 * factor), 2.0, errors=round(6 * factor) + 1)["errors"].verdict is Verdict.FAIL


def test_what_is_not_in_sight_is_not_promised() -> None:
    assert str(explain.outlook(SPEC, judged(100, 2.0)["errors"], 1.0)) == "no sign against the canary"
    assert str(Outlook(Verdict.PASS, None, None)) == "stays undecided at this difference"


def test_the_table_says_what_each_guard_needs() -> None:
    lines = explain.lines(SPEC, list(judged(60, 2.02).values()), 2.0)
    assert len(lines) == 1 + len(SPEC.guards)
    assert "more requests per arm (about" in lines[1]
    assert lines[0].split()[:3] == ["verdict", "guard", "segment"]


def test_what_is_missing_in_keys_is_told_in_requests() -> None:
    early = judged(60, 2.02)["tokens_per_step"]
    alone, many = (explain.outlook(SPEC, early, 2.0, per_key) for per_key in (1.0, 20.0))
    assert alone.requests
    assert many.requests == 20 * alone.requests
    tree = {"inputs": {"segments": [{"traffic_class": None, "requests": 60, "keys": 3}]}}
    assert (explain.per_key(tree), explain.per_key({})) == (20.0, 1.0)


def test_where_keys_do_not_differ_at_all_nothing_is_certain() -> None:
    """Nothing is accepted in either arm: without a variance there is no interval, and no PASS."""
    level = judged(500, 1.0, noise=0.0, control=1.0)["tokens_per_step"]
    assert level.verdict is Verdict.INSUFFICIENT
    for guard in (level, replace(level, low=None, high=None)):  # as judged, and as stored
        assert str(explain.outlook(SPEC, guard, 1.0)) == "stays undecided at this difference"


def test_a_class_that_leans_is_named_and_no_pass_is_promised() -> None:
    guard = replace(judged(500, 2.0)["tokens_per_step"], verdict=Verdict.INSUFFICIENT, log_e=5.0, limit=6.6, lean=6.0)
    guard = replace(guard, worst="batch")
    leans = "leans against the canary in class batch, which keeps it from promotion"
    assert str(explain.outlook(SPEC, guard, 0.0)) == f"needs about 160 more requests per arm to FAIL; {leans}"
    assert str(explain.outlook(SPEC, replace(guard, log_e=-1.0), 0.0)) == leans
    assert str(explain.outlook(SPEC, replace(guard, verdict=Verdict.PASS), 0.0)) == f"PASS now; {leans}"
    alike = replace(guard, worst="", guard="errors", verdict=Verdict.PASS)
    assert "in all classes together" in str(explain.outlook(SPEC, alike, 0.0))


def test_next_to_no_evidence_is_no_sign() -> None:
    guard = replace(judged(500, 2.0)["errors"], log_e=5e-324)
    assert str(explain.outlook(SPEC, guard, 1.0)) == "no sign against the canary"
