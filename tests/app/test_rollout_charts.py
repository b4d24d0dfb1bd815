"""The rollout's own charts and class table, with nothing, with NaN, and with both arms."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pandas as pd
import pytest

from app.charts import rollout as charts
from app.charts.theme import DARK, LIGHT
from app.components import rollout
from app.components.guard_table import name_of

AT = pd.Series(pd.date_range(datetime(2026, 3, 1, tzinfo=UTC), periods=3, freq=timedelta(minutes=1)))
NAN = float("nan")


def segment(arm: str, name: str | None, **changes: Any) -> dict[str, Any]:
    latencies = {"e2e": [[0, 35], [90, 10]]}
    whole = {"requests": 100, "x": 220.0, "y": 100.0, "error_keys": 1, "timeout_keys": 0, "latencies": latencies}
    return {"arm": arm, "traffic_class": name} | whole | changes


@pytest.mark.parametrize("near", [[], [NAN], [0.2], [NAN, -4.0, 2.0]])
def test_boundaries_draw_whatever_there_is(near: list[float]) -> None:
    frame = pd.DataFrame({"at": AT[: len(near)], "guard": ["errors"] * len(near), "near": near})
    made = charts.boundaries(frame, LIGHT)
    made.to_json()
    drawn = [y for line in made.data for y in line.y]
    assert all(-100 <= y <= 150 for y in drawn)
    assert bool(made.layout.annotations)  # the limit, or why there is nothing


@pytest.mark.parametrize("ms", [[], [NAN], [0.0], [12.0, 40.0]])
def test_quantile_curves_draw_whatever_there_is(ms: list[float]) -> None:
    frame = pd.DataFrame({"arm": ["canary"] * len(ms), "level": [0.5, 0.9][: len(ms)], "ms": ms})
    charts.quantile_curves(frame, 3, 2, DARK).to_json()


def test_curves_are_of_all_classes_and_both_arms() -> None:
    counts = [segment("canary", None), segment("control", None, latencies={}), segment("canary", "chat")]
    frame = rollout.curves(counts, "e2e")
    assert set(frame["arm"]) == {"canary"}
    assert frame["ms"].is_monotonic_increasing
    assert rollout.curves([], "e2e").empty
    assert rollout.curves(counts, "tpot").empty


def test_a_class_that_one_arm_has_not_seen_has_gaps_not_errors() -> None:
    counts = [segment("canary", None, x=242.0), segment("control", None), segment("control", "code", y=0.0)]
    rows = rollout.class_rows(counts, "e2e").set_index("class")
    assert list(rows.index) == ["all", "code"]
    assert rows.loc["all", "change"] == pytest.approx(10.0)
    assert rows.loc["all", "p50_canary"] == pytest.approx(1000, rel=0.02)
    assert (rows.loc["code", "n_canary"], rows.loc["code", "n_control"]) == (0, 100)
    assert rows.loc["code", ["tokens_canary", "tokens_control", "p95_canary", "change"]].isna().all()
    assert rollout.class_rows([], "e2e").empty


@pytest.mark.parametrize(
    ("guard", "name"),
    [("e2e_p95", "p95 e2e"), ("tpot_p99.9", "p99.9 TPOT"), ("fuse_p95", "p95 TTFT ≤ 3 ×"), ("srm", "even split")],
)
def test_guards_have_names_that_people_read(guard: str, name: str) -> None:
    assert name_of(guard, [{"kind": "fuse_p95", "metric": "ttft", "ratio": 3.0}]) == name
