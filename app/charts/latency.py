"""Latency and acceptance over time. DataFrame → figure, pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from app.charts.figure import Figure
from app.charts.theme import Palette, Window, empty, figure, floats, instants, log_axis, mark_deploys, time_axis

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
) -> Figure:
    """p50, p95 and p99 in ms on a log axis; the canary's p95 dashed in its version's colour.

    ``frame`` and ``canary``: at, {metric}_p50, _p95, _p99; canary also policy_version.
    """
    found = [floats(frame, f"{metric}_{name}") for name in QUANTILES]
    if all(np.isnan(values).all() for values in found):
        return empty(NOTHING, colours, TALL)
    made = figure(colours, TALL)
    at = instants(frame["at"]).to_numpy()
    for name, values, colour in zip(QUANTILES, found, colours.quantiles, strict=True):
        _line(made, at, values, name, {"color": colour})
    for version, at, values in _each_version(canary, f"{metric}_p95"):
        style = {"dash": "dash", "color": colours.version(version)}
        _line(made, at, values, f"canary v{version} p95", style)
    made.update_traces(hovertemplate="%{y:,.0f} ms")
    found += [floats(canary, f"{metric}_{name}") for name in QUANTILES]
    shown = np.concatenate(found)
    log_axis(made, float(np.nanmin(shown)), float(np.nanmax(shown)))
    return mark_deploys(time_axis(made, window), plans, window, colours, width=560)


def heat_map(frame: pd.DataFrame, plans: pd.DataFrame, window: Window, colours: Palette, metric: str = "e2e") -> Figure:
    """Requests by time and latency on a log axis. ``frame``: at, until, low, high (ms), requests; ``metric`` names it.

    An unseen point is there because Plotly lets nobody drag over a chart that has none.
    """
    if frame.empty:
        return empty(NOTHING, colours, TALL)
    at, until = (instants(frame[name]).to_numpy() for name in ("at", "until"))
    low_ms, high_ms, requests = (floats(frame, name) for name in ("low", "high", "requests"))
    width, ratio = until[0] - at[0], float(high_ms[0] / low_ms[0])
    rows = np.round(np.log(low_ms / low_ms.min()) / math.log(ratio)).astype(int)
    columns = (at - at.min()) // width
    grid = np.full((rows.max() + 1, columns.max() + 1), np.nan)
    grid[rows, columns] = requests
    times = at.min() + width * np.arange(grid.shape[1] + 1)
    lows = float(low_ms.min()) * ratio ** np.arange(grid.shape[0] + 1)
    edges = np.stack((lows[:-1], lows[1:]), 1).astype(np.float32)
    made = figure(colours, TALL)
    low, middle, high = colours.heat
    made.add_heatmap(
        x=times,
        y=lows,
        z=grid,
        colorscale=[[0, low], [0.5, middle], [1, high]],
        customdata=np.broadcast_to(edges[:, None], (*grid.shape, 2)),
        hovertemplate="%{customdata[0]:,.0f} to %{customdata[1]:,.0f} ms: %{z} requests<extra></extra>",
        hoverongaps=False,
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
    made.add_scatter(x=times[:1], y=lows[:1], mode="markers", marker={"opacity": 0}, hoverinfo="skip", showlegend=False)
    made.update_layout(hovermode="closest")
    log_axis(made, float(lows[0]), float(lows[-1]))
    time_axis(made, window).update_layout(selectdirection="any", meta={"of": metric})
    return mark_deploys(made, plans, window, colours, over=True)


def by_version(
    frame: pd.DataFrame, column: str, plans: pd.DataFrame, window: Window, colours: Palette, form: str = ".2f"
) -> Figure:
    """One line a version, in its colour for life. ``frame``: at, policy_version, ``column``; ``form`` ends with % where
    that is a share."""
    scale, unit = (100.0, " %") if form.endswith("%") else (1.0, "")
    if frame.empty or frame[column].isna().all():
        return empty(NOTHING, colours)
    made = figure(colours)
    for version, at, values in _each_version(frame, column):
        if not np.isnan(values).all():
            _line(made, at, scale * values, f"v{version}", {"color": colours.version(version)})
    made.update_traces(hovertemplate=f"%{{y:{form.replace('%', 'f')}}}{unit}")
    made.update_layout(showlegend=True)
    made.update_yaxes(nticks=6, ticksuffix=unit)
    return mark_deploys(time_axis(made, window), plans, window, colours)


def positions(frame: pd.DataFrame, colours: Palette) -> Figure:
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


def _line(made: Figure, at: np.ndarray, values: np.ndarray, name: str, style: dict[str, str]) -> None:
    """A line that breaks where there was no traffic; points that stand alone between gaps get a marker."""
    is_gap = np.concatenate(([True], np.isnan(values), [True]))
    alone = ~is_gap[1:-1] & is_gap[:-2] & is_gap[2:]
    made.add_scatter(
        x=at,
        y=values,
        name=name,
        mode="lines+markers",
        line={"width": 2, **style},
        marker={"size": np.where(alone, 5, 0), "color": style["color"], "line": {"width": 0}},
        connectgaps=False,
    )


def _each_version(frame: pd.DataFrame, column: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(version, instants, values) of each, ascending."""
    if frame.empty:
        return
    versions, at, values = frame["policy_version"].to_numpy(), instants(frame["at"]).to_numpy(), floats(frame, column)
    for version in np.unique(versions):
        chosen = versions == version
        yield int(version), at[chosen], values[chosen]
