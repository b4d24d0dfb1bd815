"""Charts on a page: one way to draw them, with words for those who do not see them, and from a stroke to its traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

from app.charts.figure import Figure
from app.charts.theme import CONFIG


def draw(figure: Figure, key: str, alt: str) -> None:
    """A chart that is looked at. ``alt`` says in a sentence what it shows."""
    st.plotly_chart(figure, key=key, config=CONFIG, theme=None, alt=alt)


def draw_to_traces(figure: Figure, key: str, alt: str) -> None:
    """A time chart: a stroke over it or a click opens the traces of that time (``strokes.js``)."""
    draw(figure, key, f"{alt} Drag over it, or click, to open the traces of that time.")


def draw_to_choose(figure: Figure, key: str, alt: str, choose: Callable[[int], None]) -> None:
    """A chart whose points are versions (``customdata``, first of a list): a click chooses one."""

    def pressed() -> None:
        event: Any = st.session_state[key]
        numbers = [point["customdata"][0] for point in event["selection"]["points"] if point.get("customdata")]
        if numbers:
            choose(int(numbers[0]))

    st.plotly_chart(figure, key=key, config=CONFIG, theme=None, alt=alt, on_select=pressed, selection_mode="points")
