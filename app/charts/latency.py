"""Latency and acceptance over time. DataFrame → figure, pure."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go

from app.charts.theme import Palette, Window, empty, figure, instants, log_axis, mark_deploys, time_axis

NOTHING = "No traffic in this window"
QUANTILES = ("p50", "p95", "p99")
TALL = 320


def percentiles(
    frame: pd.DataFrame,
    canary: pd.DataFrame,
    plans: pd.DataFrame,
    window: Window,
    colours: Palette,
    metric: str = "e2e",
) -> go.Figure:
    """p50, p95 and p99 in ms on a log axis; the canary's p95 dashed in its version's colour.

    ``frame`` and ``canary``: at, {metric}_p50, _p95, _p99; canary also policy_version.
    """
    names = [f"{metric}_{name}" for name in QUANTILES]
    if frame.empty or frame[names].isna().all(axis=None):
        return empty(NOTHING, colours, TALL)
    made = figure(colours, TALL)
    for name, colour in zip(QUANTILES, colours.quantiles, strict=True):
        _line(made, frame, f"{metric}_{name}", name, {"color": colour})
    for version, rows in canary.groupby("policy_version") if not canary.empty else ():
        style = {"dash": "dash", "color": colours.version(int(version))}
        _line(made, rows, f"{metric}_p95", f"canary v{version} p95", style)
    made.update_traces(hovertemplate="%{y:,.0f} ms")
    shown = pd.concat([frame[names], canary[names]]) if not canary.empty else frame[names]
    log_axis(made, float(shown.min(axis=None)), float(shown.max(axis=None)))
    return mark_deploys(time_axis(made, window), plans, window, colours, width=560)


def heat_map(frame: pd.DataFrame, plans: pd.DataFrame, window: Window, colours: Palette) -> go.Figure:
    """Requests by time and latency on a log axis. ``frame``: at, until, low, high (ms), requests.

    Plotly selects points and no cells, so an unseen point lies in the middle of each cell that has requests;
    ``customdata`` is its latencies, [low, high).
    """
    if frame.empty:
        return empty(NOTHING, colours, TALL)
    grid = frame.pivot_table(index="low", columns="at", values="requests", aggfunc="sum")
    width = frame["until"].iloc[0] - frame["at"].iloc[0]
    times = pd.date_range(grid.columns.min(), grid.columns.max(), freq=width)
    ratio = float((frame["high"] / frame["low"]).iloc[0])
    steps = round(math.log(grid.index.max() / grid.index.min(), ratio)) if len(grid) > 1 else 0
    lows = [float(grid.index.min()) * ratio**step for step in range(steps + 1)]
    rows = [round(math.log(low / lows[0], ratio)) for low in grid.index]
    grid = grid.set_axis(rows, axis=0).reindex(index=range(len(lows)), columns=times)
    made = figure(colours, TALL)
    low, middle, high = colours.heat
    made.add_heatmap(
        x=[*times, times[-1] + width],
        y=[*lows, lows[-1] * ratio],
        z=grid.to_numpy(),
        colorscale=[[0, low], [0.5, middle], [1, high]],
        hoverinfo="skip",
        colorbar={
            "thickness": 8,
            "len": 1,
            "x": 1.015,
            "xpad": 0,
            "ypad": 0,
            "outlinewidth": 0,
            "nticks": 5,
            "tickfont": {"size": 10, "color": colours.muted},
        },
    )
    made.add_scatter(
        x=instants(frame["at"] + width / 2),
        y=frame["low"] * math.sqrt(ratio),
        mode="markers",
        marker={"size": 12, "opacity": 0, "color": middle},
        customdata=frame[["low", "high", "requests"]].to_numpy(),
        hovertemplate="%{customdata[0]:,.0f} to %{customdata[1]:,.0f} ms: %{customdata[2]} requests<extra></extra>",
        showlegend=False,
        unselected={"marker": {"opacity": 0}},
        selected={"marker": {"opacity": 0}},
    )
    made.update_layout(hovermode="closest")
    log_axis(made, lows[0], lows[-1] * ratio)
    return mark_deploys(time_axis(made, window), plans, window, colours, over=True)


def by_version(
    frame: pd.DataFrame, column: str, plans: pd.DataFrame, window: Window, colours: Palette, form: str = ".2f"
) -> go.Figure:
    """One line a version, in its colour for life. ``frame``: at, policy_version, ``column``."""
    if frame.empty or frame[column].isna().all():
        return empty(NOTHING, colours)
    made = figure(colours)
    for version, rows in frame.groupby("policy_version"):
        if rows[column].notna().any():
            _line(made, rows, column, f"v{version}", {"color": colours.version(int(version))})
    made.update_traces(hovertemplate=f"%{{y:{form}}}")
    made.update_layout(showlegend=True)
    made.update_yaxes(nticks=6)
    return mark_deploys(time_axis(made, window), plans, window, colours)


def positions(frame: pd.DataFrame, colours: Palette) -> go.Figure:
    """Unconditional acceptance by draft position, %. ``frame``: policy_version, position (0-based), acceptance."""
    if frame.empty or frame["acceptance"].isna().all():
        return empty("Nothing was drafted in this window", colours)
    made = figure(colours)
    for version, rows in frame.groupby("policy_version"):
        made.add_bar(
            x=[f"{position + 1}" for position in rows["position"]],
            y=rows["acceptance"] * 100,
            name=f"v{version}",
            marker={"color": colours.version(int(version))},
            hovertemplate="%{y:.1f} %",
        )
    made.update_layout(barmode="group", bargap=0.3, showlegend=True, hovermode="x")
    made.update_yaxes(ticksuffix=" %", rangemode="tozero")
    return made


def _line(made: go.Figure, rows: pd.DataFrame, column: str, name: str, style: dict[str, str]) -> None:
    """A line that breaks where there was no traffic; points that stand alone between gaps get a marker."""
    values = rows[column]
    alone = values.notna() & values.shift().isna() & values.shift(-1).isna()
    made.add_scatter(
        x=instants(rows["at"]),
        y=values,
        name=name,
        mode="lines+markers",
        line={"width": 2, **style},
        marker={"size": [5 if one else 0 for one in alone], "color": style["color"], "line": {"width": 0}},
        connectgaps=False,
    )
