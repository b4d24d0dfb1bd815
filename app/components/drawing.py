"""Charts on a page: one way to draw them, with words for those who do not see them, and from a stroke to its traces."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import streamlit as st

from app.charts.figure import Figure
from app.charts.theme import CONFIG
from app.components.context import parameters
from engine.store.repositories.overview import Slice

TRACES = "views/traces.py"


def draw(figure: Figure, key: str, alt: str) -> None:
    """A chart that is looked at. ``alt`` says in a sentence what it shows."""
    st.plotly_chart(figure, key=key, config=CONFIG, theme=None, alt=alt)


def draw_to_traces(figure: Figure, key: str, alt: str, part: Slice, latency: str | None = None) -> None:
    """A time chart: dragging over it, or a click on a point, opens the traces of that time.

    ``latency`` names what a heat map's rows are of: the stroke then bounds that too.
    """
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
        bounds = {} if latency is None else band(event, latency)
        st.switch_page(TRACES, query_params=parameters(chosen) | bounds)


def draw_to_choose(figure: Figure, key: str, alt: str, choose: Callable[[int], None]) -> None:
    """A chart whose points are versions (``customdata``, first of a list): a click chooses one."""

    def pressed() -> None:
        event: Any = st.session_state[key]
        numbers = [point["customdata"][0] for point in event["selection"]["points"] if point.get("customdata")]
        if numbers:
            choose(int(numbers[0]))

    st.plotly_chart(figure, key=key, config=CONFIG, theme=None, alt=alt, on_select=pressed, selection_mode="points")


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


def band(event: Any, latency: str) -> dict[str, str]:
    """The latencies of the chosen cells (``customdata``: low and high, ms), as the traces page takes them."""
    cells = [point["customdata"] for point in event["selection"].get("points") or () if point.get("customdata")]
    if not cells:
        return {}
    low, high = min(float(cell[0]) for cell in cells), max(float(cell[1]) for cell in cells)
    return {"of": latency, "min_ms": f"{math.floor(low)}", "max_ms": f"{math.ceil(high)}"}


def _instant(x: Any) -> datetime:
    """What Plotly gives back of a time axis: UTC without saying so."""
    at = datetime.fromtimestamp(x / 1e3, UTC) if isinstance(x, int | float) else datetime.fromisoformat(str(x))
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
