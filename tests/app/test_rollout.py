"""What the rollouts page makes of a decision's evidence."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from app.charts.theme import LIGHT
from app.components import verbs
from app.components.guard_table import guard_rows, outlooks
from app.components.rollout import differences, steps
from engine.contracts import Arm, RolloutState, ServingPlan, Verdict
from engine.rollout import specs
from engine.store.repositories.rollouts import DecisionRecord, Rollout

AT = datetime(2026, 3, 1, tzinfo=UTC)


def guard(name: str, **changes: Any) -> dict[str, Any]:
    blank = dict.fromkeys(("canary", "control", "low", "high", "log_e", "limit"))
    return {
        "guard": name,
        "verdict": "PASS",
        "reason": "fine",
        "segment": "all",
        "n_canary": 73,
        "n_control": 1056,
        **blank,
        **changes,
    }


def decision(*guards: dict[str, Any]) -> DecisionRecord:
    ramping = RolloutState.RAMPING
    return DecisionRecord(1, AT, ramping, ramping, Verdict.PASS, "", "none", 7, None, 1, {}, {"guards": list(guards)})


def rollout(state: RolloutState, stages: int) -> Rollout:
    status = {"stages": [{}] * stages}
    return Rollout(1, "v5", {"steps": [0.3, 0.5]}, "", 5, 3, "learner", state, status, AT, AT + timedelta(minutes=1))


def test_every_guard_is_written_in_its_own_unit() -> None:
    frame = guard_rows(
        [
            guard("tokens_per_step", canary=2.344, control=2.04, low=0.11, high=0.48, log_e=-0.4, limit=5.3),
            guard("fuse_p95", canary=0.02, control=0.01, limit=4.0),
            guard("errors", canary=1.0, control=0.0, log_e=5.3, limit=5.3),
            guard("srm"),
            guard("a_guard_of_tomorrow", canary=1.5),
        ]
    )
    assert list(frame["canary"]) == ["2.34", "20.0 ms", "1", "", "1.5"]
    assert list(frame["interval"]) == ["+0.11 to +0.48", "", "", "", ""]
    assert frame["near"].fillna(-1).tolist() == [0.0, 50.0, 100.0, -1, -1]
    assert frame["n"][0] == "73 / 1,056"
    assert frame["guard"].tolist()[-1] == "a guard of tomorrow"


def test_the_fuse_says_which_latency_it_judges_and_how_much_it_allows() -> None:
    fuse = {"kind": "fuse_p95", "metric": "tpot", "ratio": 3.0, "min_requests": 60}
    frame = guard_rows([guard("fuse_p95", canary=0.0142, control=1.5)], [{"kind": "srm"}, fuse])
    assert (frame["guard"][0], frame["canary"][0], frame["control"][0]) == ("p95 TPOT ≤ 3 ×", "14.2 ms", "1,500 ms")


def test_a_guard_says_what_it_still_needs() -> None:
    sizes = {"requests": 50, "keys": 50, "stage_requests": 50, "traffic_class": None}
    counts = [{"arm": arm, **sizes} for arm in ("canary", "control")]
    spec = specs.to_dict(specs.preset("fast"))
    one = replace(rollout(RolloutState.RAMPING, 1), spec=spec)
    judged = decision(
        guard("errors", verdict="INSUFFICIENT", canary=4, control=1, n_canary=50, n_control=50, log_e=2.0, limit=6.0),
        guard("srm", log_e=0.1, limit=6.9),
        guard("fuse_restarts"),
    )
    began = {"stages": [{"began": (AT - timedelta(seconds=50)).isoformat()}]}
    said = outlooks(replace(judged, status_before=began), one, counts)
    assert said == ["needs about 100 more requests per arm (about 2 min) to FAIL", "", ""]
    rows = guard_rows(judged.evidence["guards"], outlooks=said)["said"].tolist()
    assert all(row.endswith(one) for row, one in zip(rows, said, strict=True))


@pytest.mark.parametrize(
    ("state", "classes", "offered"),
    [
        (RolloutState.SOAKING, None, True),
        (RolloutState.HELD, None, True),
        (RolloutState.PROMOTING, None, False),
        (RolloutState.WATCHING, None, False),
        (RolloutState.ROLLING_BACK, None, False),
        (RolloutState.SOAKING, frozenset({"chat"}), False),
    ],
)
def test_promote_is_offered_only_where_the_controller_may_obey(
    state: RolloutState, classes: frozenset[str] | None, offered: bool
) -> None:
    plan = ServingPlan(4, 3, 1, (Arm("canary", 5, 0.5), Arm("control", 3, 0.5)), "s", "t", "r", AT, classes)
    serving = SimpleNamespace(target=3, rollout=rollout(state, 2), plan=plan)
    assert ("promote" in verbs._offered(serving)) is offered  # type: ignore[arg-type]


def test_no_guard_no_rows() -> None:
    assert guard_rows([]).empty


def test_the_difference_is_that_of_all_classes() -> None:
    both = decision(
        guard("tokens_per_step", canary=2.5, control=2.0, low=0.1, high=0.9),
        guard("tokens_per_step", segment="chat", canary=9.0, control=2.0),
        guard("errors", canary=1.0, control=0.0),
    )
    frame = differences([both, decision(guard("tokens_per_step"))], max_drop=0.05)
    assert frame.to_dict("records") == [{"at": AT, "difference": 0.5, "low": 0.1, "high": 0.9, "allowed": -0.1}]


@pytest.mark.parametrize(
    ("state", "stages", "here"),
    [
        (RolloutState.READY, 0, None),
        (RolloutState.RAMPING, 1, "30 %"),
        (RolloutState.HELD, 2, "50 %"),
        (RolloutState.SOAKING, 2, "soak"),
        (RolloutState.PROMOTING, 2, "champion"),
        (RolloutState.DONE, 2, None),
    ],
)
def test_the_station_of_a_rollout(state: RolloutState, stages: int, here: str | None) -> None:
    html = steps(rollout(state, stages), LIGHT)
    bold = [part.split("</span>")[1] for part in html.split("font-weight:600")[1:]]
    assert bold == ([here] if here else [])
