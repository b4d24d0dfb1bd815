"""Charts are pure and take whatever a query may give: nothing, one row, holes."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
import pytest

from app.charts import latency, rollout, trace
from app.charts.figure import Figure
from app.charts.theme import DARK, LIGHT, Palette, log_axis, mark_deploys
from app.components.tables import sparkline, trends

AT = pd.date_range("2026-03-01 12:00", periods=5, freq="1min", tz="UTC")
WINDOW = (AT[0].to_pydatetime(), AT[4].to_pydatetime())
NO_PLANS = pd.DataFrame(columns=["at", "label", "canary"])
PLANS = pd.DataFrame(
    {"at": AT[[1, 2, 4]], "label": ["v2 champion", "v3 25 %", "v3 champion"], "canary": [None, 3, None]}
)
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
        latency.percentiles(data, data, marks, WINDOW, colours),
        latency.by_version(data, "acceptance_length", marks, WINDOW, colours),
    ):
        assert isinstance(figure.checked(), go.Figure)
        figure.to_json()


def test_an_empty_chart_says_so() -> None:
    assert (
        "No traffic"
        in latency.percentiles(pd.DataFrame(), pd.DataFrame(), NO_PLANS, WINDOW, LIGHT).layout.annotations[0].text
    )
    assert "No traffic" in latency.heat_map(pd.DataFrame(), NO_PLANS, WINDOW, LIGHT).layout.annotations[0].text


def test_a_gap_stays_a_gap() -> None:
    line = latency.percentiles(frame(5, holes=True), pd.DataFrame(), NO_PLANS, WINDOW, LIGHT).data[0]
    assert line.connectgaps is False
    assert pd.isna(line.y[1])


def test_a_version_keeps_its_colour() -> None:
    alone = frame(3)
    among = pd.concat([frame(3).assign(policy_version=1), alone, frame(3).assign(policy_version=8)])
    first = latency.by_version(alone, "acceptance_length", NO_PLANS, WINDOW, LIGHT).data[0]
    second = latency.by_version(among, "acceptance_length", NO_PLANS, WINDOW, LIGHT).data[1]
    assert first.name == second.name == "v3"
    assert first.line.color == second.line.color


def test_every_plan_has_a_mark_but_labels_do_not_collide() -> None:
    close = pd.DataFrame({"at": [AT[0], AT[0] + pd.Timedelta("1s")], "label": ["a", "b"], "canary": None})
    made = mark_deploys(Figure(), close, WINDOW, LIGHT)
    assert len(made.layout.shapes) == 2
    assert [a.text for a in made.layout.annotations] == ["b"]


def test_a_canary_tints_the_time_it_served_even_when_it_began_before_the_window() -> None:
    plans = pd.DataFrame({"at": [AT[0] - pd.Timedelta("1h"), AT[2]], "label": ["", "v2 champion"], "canary": [3, None]})
    line, tint = mark_deploys(Figure(), plans, WINDOW, LIGHT).layout.shapes
    assert (tint.type, tint.x0, tint.x1, tint.fillcolor) == ("rect", WINDOW[0], AT[2], LIGHT.version(3))
    assert line.type == "line"


def test_positions() -> None:
    positions = pd.DataFrame({"policy_version": [2, 2], "position": [0, 1], "acceptance": [0.5, 0.25]})
    assert list(latency.positions(positions, LIGHT).data[0].y) == [50.0, 25.0]


@pytest.mark.parametrize("rows", [1, 2])
def test_the_heat_map_has_a_cell_for_every_bin_and_gaps_between(rows: int) -> None:
    minute = pd.Timedelta("1min")
    at = AT[[0, 3][:rows]]
    low = [100.0, 100.0 * 1.2**3][:rows]
    frame = pd.DataFrame({"at": at, "until": at + minute, "low": low, "requests": [3, 4][:rows]})
    frame["high"] = frame["low"] * 1.2
    drawn = latency.heat_map(frame, NO_PLANS, WINDOW, LIGHT).data[0]
    assert drawn.z.shape == ((1, 1) if rows == 1 else (4, 4))
    assert (len(drawn.y), len(drawn.x)) == (drawn.z.shape[0] + 1, drawn.z.shape[1] + 1)
    assert pd.Series(drawn.z.ravel()).sum() == frame["requests"].sum()


@pytest.mark.parametrize(("low", "high"), [(200.0, 900.0), (1.0, 30_000.0), (400.0, 401.0), (10.0, 200.0)])
def test_a_log_axis_has_a_few_round_ticks(low: float, high: float) -> None:
    axis = log_axis(Figure(), low, high).layout.yaxis
    assert 1 <= len(axis.tickvals) <= 9
    assert all(low / 1.2 <= tick <= high * 1.2 for tick in axis.tickvals)


def test_a_log_axis_of_nothing_stays_as_it_was() -> None:
    assert log_axis(Figure(), float("nan"), 1.0).layout.yaxis.type is None


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_certainty_draws_whatever_there_is(rows: int) -> None:
    frame = pd.DataFrame(
        {"at": AT[:rows], "difference": [0.2] * rows, "low": [None, 0.0, 0.1][:rows], "high": [None, 0.5, 0.4][:rows],
         "allowed": [-0.05] * rows}
    )  # fmt: skip
    rollout.certainty(frame, 3, DARK).to_json()


def test_sparklines_share_one_scale_and_a_version_without_traffic_has_none() -> None:
    over_time = pd.DataFrame({"policy_version": [3, 3, 5], "acceptance_length": [2.0, float("nan"), 2.5]})
    moved = trends(over_time, pd.Series([5, 3, 1]))
    assert moved == [[2.5], [2.0], []]
    assert trends(pd.DataFrame(), pd.Series([1])) == [[]]
    column = sparkline("", pd.Series(moved), 1.0)["type_config"]
    assert (column["y_min"], column["y_max"]) == (1.0, pytest.approx(2.75))
    assert sparkline("", pd.Series([[]]), 1.0)["type_config"]["y_max"] > 1.0


def test_the_waterfall_lies_end_to_end() -> None:
    bars = trace.waterfall([("queue", 0.0, 5.0), ("prefill", 5.0, 20.0)], LIGHT).data[0]
    assert list(bars.base) == [0.0, 5.0]
    assert trace.waterfall([], LIGHT).layout.annotations
    assert trace.steps([], [], LIGHT).layout.annotations
