"""Colours and the common frame of every figure. A colour means judgement or identity, nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd

from app.charts.figure import Figure

CONFIG = {"displayModeBar": False, "responsive": True}
BAND = {"xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
FONT = "Inter, sans-serif"
Window = tuple[datetime, datetime]
"""What a time chart spans, [since, until)."""


@dataclass(frozen=True, slots=True)
class Palette:
    """One mode's colours. ``quantiles`` are p50, p95, p99: one hue in three depths. ``versions`` are told apart by
    people who do not see all hues (after Okabe and Ito 2008); a version keeps its colour for life."""

    text: str
    muted: str
    grid: str
    good: str
    bad: str
    warn: str
    quantiles: tuple[str, str, str]
    versions: tuple[str, ...]
    heat: tuple[str, str, str]
    card: str

    def version(self, number: int) -> str:
        return self.versions[number % len(self.versions)]


LIGHT = Palette(
    text="#1c1e21",
    muted="#6c7076",
    grid="#e6e7e4",
    good="#1a7f5a",
    bad="#c4314b",
    warn="#b45f06",
    quantiles=("#8db8ef", "#3f7fd6", "#12408f"),
    versions=("#6c7076", "#0072b2", "#d55e00", "#009e73", "#b0508c", "#8a6d00", "#4a9fd0", "#6a3d9a", "#a65628"),
    heat=("#eef4fc", "#5b96de", "#0d3272"),
    card="#ffffff",
)
DARK = Palette(
    text="#e7e8ea",
    muted="#9a9fa7",
    grid="#2b2e33",
    good="#5cc49a",
    bad="#f0788c",
    warn="#e8a24a",
    quantiles=("#4470b4", "#6ea5ef", "#c9dffb"),
    versions=("#9a9fa7", "#5aaee6", "#f28a3c", "#3cc79c", "#dc8cc0", "#d8b33c", "#8fd0f5", "#b494e0", "#d08a66"),
    heat=("#1b2635", "#3f7fd6", "#d6e7fd"),
    card="#1e2023",
)


def palette(dark: bool) -> Palette:
    return DARK if dark else LIGHT


def figure(colours: Palette, height: int = 280) -> Figure:
    """An empty figure with the house's axes: no frame, faint horizontal grid, the legend above on the left.

    Plotly's template is left out, which is nine tenths of the bytes of a small figure.
    """

    def axis(**more: Any) -> dict[str, Any]:
        return {"zeroline": False, "automargin": True, "tickfont": {"color": colours.muted, "size": 11}, **more}

    return Figure(
        layout={
            "template": {},
            "height": height,
            "margin": {"l": 4, "r": 4, "t": 44, "b": 4},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": FONT, "size": 12, "color": colours.text},
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1,
                "yref": "container",
                "yanchor": "top",
                "font": {"size": 11},
                "itemwidth": 30,
                "bgcolor": "rgba(0,0,0,0)",
            },
            "hovermode": "x unified",
            "hoverlabel": {
                "font": {"family": FONT, "size": 12, "color": colours.text},
                "bgcolor": colours.card,
                "align": "left",
            },
            "barmode": "overlay",
            "uirevision": "keep",
            "xaxis": axis(showgrid=False, linecolor=colours.grid),
            "yaxis": axis(gridcolor=colours.grid),
        }
    )


def time_axis(made: Figure, window: Window) -> Figure:
    """Every time chart of a page spans the whole window, so that the same moment is at the same place.

    A stroke over it, sideways, opens the traces of that time (``strokes.js``). Its margins are given, room for "500 ms"
    and "12:30": to find them Plotly draws every chart twice.
    """
    since, until = window
    short = (until - since) <= timedelta(hours=36)
    made.update_layout(margin={"l": 52, "b": 24}, dragmode="select", selectdirection="h", meta={"opens": "traces"})
    made.update_yaxes(automargin=False)
    made.update_xaxes(
        automargin=False,
        range=[since, until],
        tickformat="%H:%M" if short else "%b %-d",
        hoverformat="%b %-d, %H:%M",
        nticks=8,
    )
    return made


def instants(at: pd.Series) -> pd.Series:
    """UTC without saying so, which is what Plotly draws."""
    return at.dt.tz_convert(None) if len(at) else at


def floats(frame: pd.DataFrame, column: str) -> np.ndarray:
    """A column as floats, nan where there is no value; nothing of an empty frame, which may have no columns."""
    return frame[column].to_numpy(dtype=float, na_value=np.nan) if len(frame) else np.empty(0)


def log_axis(made: Figure, low: float, high: float) -> Figure:
    """A logarithmic axis of milliseconds whose ticks are round numbers, more of them where it spans little."""
    if not (low > 0 and high > 0 and math.isfinite(low) and math.isfinite(high)):
        return made
    low, high = low / 1.12, high * 1.12
    decades = math.log10(high / low)
    digits = (
        (1, 1.5, 2, 3, 4, 5, 7) if decades < 0.7 else (1, 2, 3, 5) if decades < 1.6 else (1, 3) if decades < 3 else (1,)
    )
    places = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [digit * 10.0**place for place in places for digit in digits if low <= digit * 10.0**place <= high]
    made.update_yaxes(
        type="log", range=[math.log10(low), math.log10(high)], tickvals=values, ticktext=[duration(v) for v in values]
    )
    return made


def duration(ms: float) -> str:
    """1500 → "1.5 s", 0.5 → "0.5 ms"."""
    return f"{ms / 1e3:g} s" if ms >= 1e3 else f"{ms:g} ms"


def mark_deploys(
    made: Figure, plans: pd.DataFrame, window: Window, colours: Palette, width: int = 340, over: bool = False
) -> Figure:
    """A dotted line where the ledger changed what is served, its label above, and a tint while a canary served.

    ``plans``: at, label, canary (its version, or missing); oldest first. ``width``: pixels the chart has at least. A
    label that would run into a newer one is left out; the line stays, and the ledger tells. ``over``: the chart is
    full of colour, so lines are drawn above it and nothing is tinted.
    """
    since, until = window
    second = width / max((until - since).total_seconds(), 1.0)  # pixels
    ends = [*plans["at"].iloc[1:], until] if len(plans) else []
    taken = width + 16.0
    shapes: list[dict[str, Any]] = []
    labels: list[dict[str, Any]] = []
    for at, label, canary, end in reversed(list(zip(plans["at"], plans["label"], plans["canary"], ends, strict=True))):
        if pd.notna(canary) and end > since and not over:
            tint = {"fillcolor": colours.version(int(canary)), "opacity": 0.09, "line": {"width": 0}}
            shapes.append(BAND | {"type": "rect", "x0": max(at, since), "x1": min(end, until), **tint})
        if not since <= at <= until:
            continue
        stroke = {"color": colours.text if over else colours.muted, "width": 1, "dash": "dot"}
        layer = "above" if over else "below"
        shapes.append(BAND | {"type": "line", "x0": at, "x1": at, "line": stroke, "layer": layer})
        left, length = (at - since).total_seconds() * second, 5.8 * len(label) + 6
        if left + length > taken:
            continue
        taken = left
        place = {"x": at, "y": 1, "yref": "paper", "yanchor": "bottom", "xanchor": "left", "xshift": -2}
        labels.append(place | {"text": label, "showarrow": False, "font": {"size": 10, "color": colours.muted}})
    return made.update_layout(shapes=shapes, annotations=labels)


def empty(message: str, colours: Palette, height: int = 280) -> Figure:
    """A figure that says what is missing and what to do."""
    made = figure(colours, height)
    made.update_xaxes(visible=False)
    made.update_yaxes(visible=False)
    made.add_annotation(
        text=message, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper", font={"color": colours.muted}
    )
    return made
