"""Charts on a page: one way to draw them, with words for those who do not see them, and from a stroke to its traces."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import streamlit as st

from app.charts.figure import Figure
from app.charts.theme import CONFIG
from app.components.context import link
from engine.store.repositories.overview import Slice

OPEN = "address to open"
"""In the session: where a stroke leads."""


def draw(figure: Figure, key: str, alt: str) -> None:
    """A chart that is looked at. ``alt`` says in a sentence what it shows."""
    st.plotly_chart(figure, key=key, config=CONFIG, theme=None, alt=alt)


def draw_to_traces(figure: Figure, key: str, alt: str, part: Slice, latency: str | None = None) -> None:
    """A time chart: dragging over it opens the traces of that time.

    ``latency`` names what a heat map's height is, in ms: the stroke then bounds that too. A callback takes it in, which
    knows the chart that was on the screen: drawn again with newer data it is another widget to Streamlit, without one.
    """

    def pressed() -> None:
        event: Any = st.session_state[key]
        if (found := selected(event, part)) is not None:
            st.session_state[OPEN] = link("traces", found, **({} if latency is None else band(event, latency)))

    if (address := st.session_state.pop(OPEN, None)) is not None:
        _go(address)
    st.plotly_chart(
        figure,
        key=key,
        config=CONFIG,
        theme=None,
        alt=f"{alt} Drag over it to open the traces of that time.",
        on_select=pressed,
        selection_mode="box",
    )


def draw_to_choose(figure: Figure, key: str, alt: str, choose: Callable[[int], None]) -> None:
    """A chart whose points are versions (``customdata``, first of a list): a click chooses one."""

    def pressed() -> None:
        event: Any = st.session_state[key]
        numbers = [point["customdata"][0] for point in event["selection"]["points"] if point.get("customdata")]
        if numbers:
            choose(int(numbers[0]))

    st.plotly_chart(figure, key=key, config=CONFIG, theme=None, alt=alt, on_select=pressed, selection_mode="points")


def _go(address: str) -> None:
    """Leave for another page of the dashboard, as a link does.

    ``st.switch_page`` takes no parameter that a widget is bound to, and a live refresh that the browser sends meanwhile
    brings it back: two of eight strokes were lost.
    """
    st.html(f"<script>window.location.assign({json.dumps(address)})</script>", unsafe_allow_javascript=True)


def selected(event: Any, part: Slice) -> Slice | None:
    """The time of a stroke over a chart; None where there was none."""
    if (box := _box(event, "x")) is None:
        return None
    since, until = sorted(map(_instant, box))
    return replace(part, since=max(since, part.since), until=min(until, part.until))


def band(event: Any, latency: str) -> dict[str, str]:
    """The latencies of a stroke, ms, as the traces page takes them."""
    if (box := _box(event, "y")) is None:
        return {}
    return {"of": latency, "min_ms": f"{math.floor(min(box))}", "max_ms": f"{math.ceil(max(box))}"}


def _box(event: Any, axis: str) -> Sequence[Any] | None:
    """Both ends of the stroke along an axis; dragging a chart twice leaves one stroke."""
    boxes = event["selection"].get("box") or ()
    return boxes[0][axis] if boxes else None


def _instant(x: Any) -> datetime:
    """What Plotly gives back of a time axis: UTC without saying so."""
    at = datetime.fromtimestamp(x / 1e3, UTC) if isinstance(x, int | float) else datetime.fromisoformat(str(x))
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
