"""Charts on a page: one way to draw them, with words for those who do not see them, and from a stroke to its traces."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from app.charts.theme import CONFIG
from app.components.context import parameters
from engine.store.repositories.overview import Slice

TRACES = "views/traces.py"


def draw(figure: go.Figure, key: str, alt: str) -> None:
    """A chart that is looked at. ``alt`` says in a sentence what it shows."""
    st.plotly_chart(figure, key=key, config=CONFIG, theme=None, alt=alt)


def draw_to_traces(figure: go.Figure, key: str, alt: str, part: Slice) -> None:
    """A time chart: dragging over it, or a click on a point, opens the traces of that time."""
    figure.update_layout(dragmode="select", selectdirection="h", clickmode="event+select")
    event: Any = st.plotly_chart(
        figure,
        key=key,
        config=CONFIG,
        theme=None,
        alt=f"{alt} Drag over it to open the traces of that time.",
        on_select="rerun",
        selection_mode=("box", "points"),
    )
    if (chosen := selected(event, part)) is not None:
        st.switch_page(TRACES, query_params=parameters(chosen))


def selected(event: Any, part: Slice) -> Slice | None:
    """The time that was chosen in a chart: a stroke's, or two minutes around a point; None where nothing was."""
    selection = (event or {}).get("selection") or {}
    for box in selection.get("box") or ():
        if len(ends := sorted(_instant(x) for x in box.get("x") or ())) >= 2:
            return replace(part, since=max(ends[0], part.since), until=min(ends[-1], part.until))
    points = [_instant(point["x"]) for point in selection.get("points") or () if "x" in point]
    if points:
        around = timedelta(seconds=max((part.until - part.since).total_seconds() / 180, 60))
        return replace(part, since=min(points) - around, until=max(points) + around)
    return None


def _instant(x: Any) -> datetime:
    """What Plotly gives back of a time axis: UTC without saying so."""
    at = datetime.fromtimestamp(x / 1e3, UTC) if isinstance(x, int | float) else datetime.fromisoformat(str(x))
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
