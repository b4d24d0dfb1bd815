"""The charts of Speculation, Drift, Explain and System take whatever a query may give: nothing, one row, holes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest

from app.charts import latency, speculation, system
from app.charts.theme import DARK, LIGHT, Palette
from app.components import context
from engine.diagnosis.decompose import Part
from engine.store.repositories.overview import Slice

AT = pd.date_range("2026-03-01 12:00", periods=5, freq="1min", tz="UTC")
WINDOW = (AT[0].to_pydatetime(), AT[4].to_pydatetime())
NO_PLANS = pd.DataFrame(columns=["at", "label", "canary"])
PLANS = pd.DataFrame({"at": AT[[1, 3]], "label": ["v3 25 %", "v3 champion"], "canary": [3, None]})
NAN = float("nan")


def frame(rows: int, value: float = 1.5) -> pd.DataFrame:
    classes = ["chat", "code", "batch", "long_form", "other"][:rows]
    numbers = dict.fromkeys(("acceptance_length", "break_even", "acceptance", "gain", "predicted_gain"), value)
    return pd.DataFrame({"at": AT[:rows], "traffic_class": classes, "policy_version": 3, "requests": 7.0, "position": 0}
                        | numbers)  # fmt: skip


@pytest.mark.parametrize("colours", [LIGHT, DARK])
@pytest.mark.parametrize(
    "data", [pd.DataFrame(), frame(1), frame(5), frame(3, NAN)], ids=["none", "one", "five", "nan"]
)
def test_every_chart_draws(data: pd.DataFrame, colours: Palette) -> None:
    for made in (
        speculation.by_class(data, "acceptance_length", NO_PLANS, WINDOW, colours),
        speculation.share_by_class(data, PLANS, WINDOW, colours),
        speculation.positions_by_class(data, colours),
        speculation.cost(data, colours),
        speculation.distribution(data.dropna(), (1.2, 2.5), colours),
        system.partitions(pd.DataFrame(), colours),
    ):
        made.to_json()


def test_what_a_step_costs_says_the_gain_that_was_expected_beside_the_one_that_came() -> None:
    made = speculation.cost(frame(2).assign(gain=1.25, predicted_gain=[1.5, NAN]), LIGHT)
    said = [text for trace in made.data[1:] for text in trace.customdata]
    assert said == ["1.25 × plain decoding; K control expected 1.50 ×", "1.25 × plain decoding"]


def test_shares_add_up_and_a_gap_is_no_bar() -> None:
    data = pd.DataFrame({"at": AT[[0, 0, 1, 1]], "traffic_class": ["a", "b"] * 2, "requests": [3.0, 1.0, NAN, NAN]})
    made = speculation.share_by_class(data, NO_PLANS, WINDOW, LIGHT)
    assert [bar.y[0] for bar in made.data] == [75.0, 25.0]
    assert all(pd.isna(bar.y[1]) for bar in made.data)
    assert {bar.marker.pattern.fillmode for bar in made.data} == {"overlay"}, "a fourth class would be white on white"


def test_every_time_chart_marks_what_the_ledger_changed() -> None:
    data = frame(5)
    cells = pd.DataFrame({"at": AT, "until": AT + pd.Timedelta("1min"), "low": 100.0, "high": 120.0, "requests": 3})
    percentiles = data.assign(**{f"e2e_{q}": 9.0 for q in ("p50", "p95", "p99")})
    made = {
        "mix": speculation.share_by_class(data, PLANS, WINDOW, LIGHT),
        "heat": latency.heat_map(cells, PLANS, WINDOW, LIGHT),
        "class": speculation.by_class(data, "acceptance_length", PLANS, WINDOW, LIGHT),
        "version": latency.by_version(data, "acceptance_length", PLANS, WINDOW, LIGHT),
        "percentiles": latency.percentiles(percentiles, pd.DataFrame(), PLANS, WINDOW, LIGHT),
    }
    for name, figure in made.items():
        lines = [shape for shape in figure.layout.shapes if shape.type == "line"]
        assert [line.x0 for line in lines] == [AT[3], AT[1]], name
        assert {line.layer for line in lines} == {"above" if name in ("mix", "heat") else "below"}, name
        assert "v3 champion" in [note.text for note in figure.layout.annotations], name


def test_the_heat_map_can_be_stroked_and_says_which_latency_it_is_of() -> None:
    cells = pd.DataFrame({"at": AT, "until": AT + pd.Timedelta("1min"), "low": 100.0, "high": 120.0, "requests": 3})
    made = latency.heat_map(cells, NO_PLANS, WINDOW, LIGHT, "ttft")
    heat, handle = made.data
    assert heat.customdata.shape == (*heat.z.shape, 2)
    assert (list(heat.customdata[0, 0]), heat.z[0, 0], heat.hoverongaps) == ([100, 120], 3, False)
    assert (handle.type, len(handle.x)) == ("scatter", 1), "Plotly lets nobody drag over a heat map alone"
    assert made.layout.meta == {"opens": "traces", "of": "ttft"}


def test_a_waterfall_lies_end_to_end_and_greys_what_may_be_nothing() -> None:
    parts = (Part("mix", 3.0, 2.0, 4.0), Part("policy", -1.0, -2.0, 0.5))
    made = system.waterfall(parts, Part("total", 2.0, 1.0, 3.0), True, "ms", LIGHT).data[0]
    assert (list(made.base), list(made.y)) == ([0.0, 3.0, 0.0], [3.0, -1.0, 2.0])
    assert list(made.marker.color) == [LIGHT.bad, LIGHT.muted, LIGHT.bad]


def test_a_moving_window_moves_in_steps_and_never_ends_in_the_past() -> None:
    hour, day = context.window(timedelta(hours=1)), context.window(timedelta(days=1))
    assert (hour.until.timestamp() % 5, day.until.timestamp() % 60) == (0, 0)
    now = datetime.now(UTC)
    assert now < day.until <= now + timedelta(seconds=60)
    assert hour.until - hour.since == timedelta(hours=1)


PART = Slice(*WINDOW, traffic_class="code", version=3)


def test_a_slice_is_a_link() -> None:
    assert context.link("traces", PART) == (
        "/traces?from=2026-03-01T12%3A00%3A00&to=2026-03-01T12%3A04%3A00&class=code&version=v3"
    )
