"""Charts are pure and take whatever a query may give: nothing, one row, holes."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
import pytest

from app.charts import latency, trace
from app.charts.theme import DARK, LIGHT, Palette, mark_deploys

AT = pd.date_range("2026-03-01 12:00", periods=5, freq="1min", tz="UTC")
NO_PLANS = pd.DataFrame(columns=["at", "label"])
PLANS = pd.DataFrame({"at": AT[[1, 2, 4]], "label": ["v2 champion", "canary v3 25%", "v3 champion"]})
COLUMNS = ["e2e_p50", "e2e_p95", "e2e_p99", "acceptance_length"]


def frame(rows: int, holes: bool = False) -> pd.DataFrame:
    made = pd.DataFrame({"at": AT[:rows], "policy_version": 3, **{name: [1.5] * rows for name in COLUMNS}})
    if holes and rows > 1:
        made.loc[1, COLUMNS] = float("nan")
    return made


FRAMES = [pd.DataFrame(), frame(1), frame(5), frame(5, holes=True)]


@pytest.mark.parametrize("colours", [LIGHT, DARK])
@pytest.mark.parametrize("data", FRAMES, ids=["empty", "one row", "five rows", "holes"])
@pytest.mark.parametrize("marks", [NO_PLANS, PLANS], ids=["no plans", "plans"])
def test_every_chart_draws(data: pd.DataFrame, marks: pd.DataFrame, colours: Palette) -> None:
    for figure in (
        latency.percentiles(data, data, marks, colours),
        latency.by_version(data, "acceptance_length", marks, colours),
    ):
        assert isinstance(figure, go.Figure)
        figure.to_json()


def test_an_empty_chart_says_so() -> None:
    assert (
        "No traffic" in latency.percentiles(pd.DataFrame(), pd.DataFrame(), NO_PLANS, LIGHT).layout.annotations[0].text
    )
    assert "No traffic" in latency.heat_map(pd.DataFrame(), LIGHT).layout.annotations[0].text


def test_a_gap_stays_a_gap() -> None:
    line = latency.percentiles(frame(5, holes=True), pd.DataFrame(), NO_PLANS, LIGHT).data[0]
    assert line.connectgaps is False
    assert pd.isna(line.y[1])


def test_a_version_keeps_its_colour() -> None:
    alone = frame(3)
    among = pd.concat([frame(3).assign(policy_version=1), alone, frame(3).assign(policy_version=8)])
    first = latency.by_version(alone, "acceptance_length", NO_PLANS, LIGHT).data[0]
    second = latency.by_version(among, "acceptance_length", NO_PLANS, LIGHT).data[1]
    assert first.name == second.name == "v3"
    assert first.line.color == second.line.color


def test_every_plan_has_a_mark_but_labels_do_not_collide() -> None:
    close = pd.DataFrame({"at": [AT[0], AT[0] + pd.Timedelta("1s")], "label": ["a", "b"]})
    made = mark_deploys(go.Figure(), close, pd.Series(AT), LIGHT)
    assert len(made.layout.shapes) == 2
    assert [a.text for a in made.layout.annotations] == ["a"]


def test_positions_and_heat_map() -> None:
    positions = pd.DataFrame({"policy_version": [2, 2], "position": [0, 1], "acceptance": [0.5, 0.25]})
    assert list(latency.positions(positions, LIGHT).data[0].y) == [50.0, 25.0]
    heat = pd.DataFrame({"at": AT[:2], "ms": [10.0, 20.0], "requests": [3, 4]})
    assert latency.heat_map(heat, LIGHT).data[0].z.shape == (2, 2)


def test_the_waterfall_lies_end_to_end() -> None:
    bars = trace.waterfall([("queue", 0.0, 5.0), ("prefill", 5.0, 20.0)], LIGHT).data[0]
    assert list(bars.base) == [0.0, 5.0]
    assert trace.waterfall([], LIGHT).layout.annotations
    assert trace.steps([], [], LIGHT).layout.annotations
