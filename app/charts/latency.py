"""Latency and acceptance over time. DataFrame → figure, pure."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from app.charts.theme import Palette, empty, figure, mark_deploys

NOTHING = "No traffic in this window"
LINE = {"width": 2}


def percentiles(
    frame: pd.DataFrame, canary: pd.DataFrame, plans: pd.DataFrame, colours: Palette, metric: str = "e2e"
) -> go.Figure:
    """p50, p95 and p99 in ms on a log axis; the canary's p95 dashed in its version's colour.

    ``frame`` and ``canary``: at, {metric}_p50, _p95, _p99; canary also policy_version.
    """
    if frame.empty:
        return empty(NOTHING, colours, 330)
    made = figure(colours, 330)
    for name, colour in zip(("p50", "p95", "p99"), colours.quantiles, strict=True):
        made.add_scatter(
            x=frame["at"],
            y=frame[f"{metric}_{name}"],
            name=name,
            mode=_mode(frame, f"{metric}_{name}"),
            line=LINE | {"color": colour},
            hovertemplate="%{y:,.0f} ms",
            connectgaps=False,
        )
    for version, rows in canary.groupby("policy_version") if not canary.empty else ():
        made.add_scatter(
            x=rows["at"],
            y=rows[f"{metric}_p95"],
            name=f"canary v{version} p95",
            mode="lines+markers",
            marker={"size": 5},
            line={"width": 2, "dash": "dash", "color": colours.version(int(version))},
            hovertemplate="%{y:,.0f} ms",
        )
    made.update_yaxes(type="log", ticksuffix=" ms", dtick="D2", tickformat=",~r")
    return mark_deploys(made, plans, frame["at"], colours, labels=6)


def heat_map(frame: pd.DataFrame, colours: Palette) -> go.Figure:
    """Requests by time and latency. ``frame``: at, ms, requests."""
    if frame.empty:
        return empty(NOTHING, colours, 330)
    grid = frame.pivot_table(index="ms", columns="at", values="requests", aggfunc="sum")
    made = figure(colours, 330)
    low, middle, high = colours.heat
    made.add_heatmap(
        x=grid.columns,
        y=[f"{ms:,.0f}" if ms >= 10 else f"{ms:.1f}" for ms in grid.index],
        z=grid.to_numpy(),
        colorscale=[[0, low], [0.5, middle], [1, high]],
        hovertemplate="%{x|%H:%M}, about %{y} ms: %{z} requests<extra></extra>",
        colorbar={"orientation": "h", "thickness": 8, "len": 0.4, "x": 1, "xanchor": "right", "y": 1.02,
                  "yanchor": "bottom", "tickfont": {"size": 10, "color": colours.muted}, "outlinewidth": 0},
        xgap=1,
        ygap=1,
    )  # fmt: skip
    made.update_layout(hovermode="closest")
    made.update_yaxes(type="category", showgrid=False, nticks=10, ticksuffix=" ms")
    return made


def by_version(frame: pd.DataFrame, column: str, plans: pd.DataFrame, colours: Palette, suffix: str = "") -> go.Figure:
    """One line a version, in its colour for life. ``frame``: at, policy_version, ``column``."""
    if frame.empty or frame[column].isna().all():
        return empty(NOTHING, colours)
    made = figure(colours)
    for version, rows in frame.groupby("policy_version"):
        made.add_scatter(
            x=rows["at"],
            y=rows[column],
            name=f"v{version}",
            mode=_mode(rows, column),
            line=LINE | {"color": colours.version(int(version))},
            hovertemplate=f"%{{y:.2f}}{suffix}",
            connectgaps=False,
        )
    made.update_layout(showlegend=True)
    return mark_deploys(made, plans, frame["at"], colours)


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
    made.update_layout(barmode="group", bargap=0.3, showlegend=True)
    made.update_yaxes(ticksuffix=" %", rangemode="tozero")
    return made


def _mode(frame: pd.DataFrame, column: str) -> str:
    """Points that stand alone between gaps would be invisible as lines."""
    return "lines+markers" if frame[column].notna().sum() < 12 else "lines"
