"""Colours and the common frame of every figure. A colour means judgement or identity, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

CONFIG = {"displayModeBar": False, "responsive": True}


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
    slice_: str

    def version(self, number: int) -> str:
        return self.versions[number % len(self.versions)]


LIGHT = Palette(
    text="#1c1e21",
    muted="#6c7076",
    grid="#e6e7e4",
    good="#1a7f5a",
    bad="#c4314b",
    warn="#b45f06",
    quantiles=("#9cc0ee", "#3f7fd6", "#12408f"),
    versions=("#6c7076", "#0072b2", "#d55e00", "#009e73", "#b0508c", "#8a6d00", "#4a9fd0", "#6a3d9a", "#a65628"),
    heat=("#eef4fc", "#5b96de", "#0d3272"),
    slice_="rgba(213, 94, 0, 0.07)",
)
DARK = Palette(
    text="#e7e8ea",
    muted="#9a9fa7",
    grid="#2b2e33",
    good="#5cc49a",
    bad="#f0788c",
    warn="#e8a24a",
    quantiles=("#345f9e", "#6ea5ef", "#c9dffb"),
    versions=("#9a9fa7", "#5aaee6", "#f28a3c", "#3cc79c", "#dc8cc0", "#d8b33c", "#8fd0f5", "#b494e0", "#d08a66"),
    heat=("#1b2635", "#3f7fd6", "#d6e7fd"),
    slice_="rgba(242, 138, 60, 0.10)",
)


def palette(dark: bool) -> Palette:
    return DARK if dark else LIGHT


def figure(colours: Palette, height: int = 280) -> go.Figure:
    """An empty figure with the house's axes: no frame, faint horizontal grid, the legend above on the left."""
    made = go.Figure()
    made.update_layout(
        height=height,
        margin={"l": 8, "r": 8, "t": 34, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "Inter, sans-serif", "size": 12, "color": colours.text},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left", "font": {"size": 11}},
        hovermode="x unified",
        hoverlabel={"font": {"family": "Inter, sans-serif", "size": 12}},
        barmode="overlay",
        uirevision="keep",
    )
    made.update_xaxes(showgrid=False, zeroline=False, tickfont={"color": colours.muted, "size": 11}, automargin=True)
    made.update_yaxes(
        gridcolor=colours.grid, zeroline=False, tickfont={"color": colours.muted, "size": 11}, automargin=True
    )
    return made


def mark_deploys(
    made: go.Figure, plans: pd.DataFrame, times: pd.Series, colours: Palette, labels: int = 3
) -> go.Figure:
    """A dotted line where the ledger changed what is served. ``plans``: at, label; oldest first.

    ``times`` is what the chart shows, ``labels`` how many fit beside each other: a mark too close to the label before
    goes without one, and hovering still tells it.
    """
    if plans.empty or times.empty:
        return made
    first, end = times.min(), times.max()
    apart = (end - first).total_seconds() / labels
    last = None
    for at, label in zip(plans["at"], plans["label"], strict=True):
        if not first - (end - first) / 20 <= at <= end:
            continue
        made.add_vline(x=at, line={"color": colours.muted, "width": 1, "dash": "dot"})
        fits = last is None or (at - last).total_seconds() > apart
        if fits and (end - at).total_seconds() > apart * 0.6:
            made.add_annotation(
                x=at,
                y=1,
                yref="paper",
                yanchor="top",
                xanchor="left",
                text=label,
                showarrow=False,
                font={"size": 10, "color": colours.muted},
                xshift=3,
            )
            last = at
    return made


def empty(message: str, colours: Palette, height: int = 280) -> go.Figure:
    """A figure that says what is missing and what to do."""
    made = figure(colours, height)
    made.update_xaxes(visible=False)
    made.update_yaxes(visible=False)
    made.add_annotation(
        text=message, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper", font={"color": colours.muted}
    )
    return made
