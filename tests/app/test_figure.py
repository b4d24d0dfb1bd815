"""Figures of plain dictionaries: the same as Plotly's own, which knows every part of them."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest
import streamlit as st

from app.charts.figure import Figure
from app.charts.theme import LIGHT, figure, instants

AT = pd.Series(pd.date_range("2026-03-01", periods=3, freq="min", tz="UTC"))
ONE = datetime(2026, 3, 1, tzinfo=UTC)
STROKE = {"color": "#123456", "width": 1}


def draw(made: Any) -> Any:
    """The verbs of charts, all of them, with the kinds of values they give."""
    made.add_scatter(x=instants(AT), y=pd.Series([1.5, np.nan, 2.0]), name="a", mode="lines", line={"color": "#111111"})
    made.add_bar(x=["1", "2"], y=np.array([3, 40_000]), customdata=np.array([[1.0, 2.0], [3.0, 4.0]]))
    made.add_heatmap(x=instants(AT).to_numpy(), y=np.array([1.0, 2.0]), z=np.array([[1.0, np.nan]]))
    made.update_traces(hovertemplate="%{y}")
    made.add_hline(y=2.0, line=STROKE, annotation={"text": "limit", "font": {"size": 10}, "yanchor": "top"})
    made.update_layout(margin={"t": 12}, barmode="group")
    made.update_xaxes(range=[ONE, ONE], nticks=6)
    made.update_xaxes(title={"text": "time"})
    made.update_yaxes(tickvals=[1, 2.5, np.float64(3)], ticktext=["a", "b", "c"])
    made.add_annotation(x=np.int64(4), y=1, text="word", showarrow=False)
    return made


def sent(made: Any) -> Any:
    """What reaches the browser, arrays of bytes as lists."""
    return _opened(json.loads(plotly.io.to_json(made, validate=False)))


def _opened(value: Any) -> Any:
    if isinstance(value, dict) and "bdata" in value:
        flat = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
        shape = [int(n) for n in value.get("shape", str(len(flat))).split(",")]
        return _opened(flat.reshape(shape).tolist())
    if isinstance(value, dict):
        return {name: _opened(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_opened(part) for part in value]
    if isinstance(value, float):
        return None if np.isnan(value) else value
    if isinstance(value, str) and value[4:5] == "-":
        return pd.Timestamp(value).tz_localize(None)
    return value


def test_the_browser_gets_what_plotly_would_send() -> None:
    ours, theirs = (sent(draw(made)) for made in (Figure({"height": 50}), go.Figure(layout={"height": 50})))
    theirs["layout"].pop("template")
    shape, note = ours["layout"]["shapes"][0], ours["layout"]["annotations"][0]
    for drawn in (shape, note):  # what Plotly writes out and its JavaScript takes for granted
        drawn.setdefault("yref", "y")
    assert ours == theirs


def test_lines_and_bands_across_are_where_plotly_puts_them() -> None:
    def across(made: Any, **position: str) -> Any:
        made.add_vline(x=1.5, line=STROKE, annotation={"text": "up"}, **position)
        made.add_vrect(x0=1.0, x1=2.0, fillcolor="#123456", opacity=0.1, line={"width": 0}, layer="below")
        return sent(made)["layout"]

    ours, theirs = across(Figure()), across(go.Figure(), annotation_position="top")
    for drawn in (*ours["shapes"], *ours["annotations"]):
        drawn.setdefault("xref", "x")
    assert (ours["shapes"], ours["annotations"]) == (theirs["shapes"], theirs["annotations"])


@pytest.mark.parametrize("fault", [{"linee": {"width": 2}}, {"mode": "wavy"}, {"line": {"widht": 2}}])
def test_no_test_draws_what_plotly_does_not_know(fault: dict[str, Any]) -> None:
    made = figure(LIGHT).add_scatter(x=[1], y=[1], **fault)
    with pytest.raises(ValueError):
        made.to_dict()


def test_streamlit_takes_it_for_a_figure() -> None:
    st.plotly_chart(draw(figure(LIGHT)))
