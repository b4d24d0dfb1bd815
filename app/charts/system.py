"""The store about itself, and a change taken apart. DataFrame → figure, pure."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from app.charts.figure import Figure
from app.charts.theme import Palette, empty, figure
from engine.diagnosis.decompose import Part
from engine.diagnosis.explain import signed

STORED = {"traces_bytes": "traces", "trace_payloads_bytes": "tokens", "rollups": "rollups per minute"}


def partitions(frame: pd.DataFrame, colours: Palette) -> Figure:
    """Megabytes a day. ``frame``: day, traces_bytes, trace_payloads_bytes, rollups_minute_bytes, …"""
    if frame.empty:
        return empty("No partition yet: housekeeping makes them ahead", colours)
    rolled = frame.reindex(columns=["rollups_minute_bytes", "rollup_histograms_minute_bytes"]).fillna(0).sum(axis=1)
    frame = frame.assign(rollups=rolled).reindex(columns=["day", *STORED]).fillna(0)
    made = figure(colours)
    for (column, name), shade in zip(STORED.items(), colours.quantiles[::-1], strict=True):
        made.add_bar(
            x=frame["day"], y=frame[column] / 1e6, name=name, marker={"color": shade}, hovertemplate="%{y:.1f} MB"
        )
    made.update_layout(barmode="stack", bargap=0.25, showlegend=True)
    made.update_xaxes(type="category", nticks=10)
    made.update_yaxes(ticksuffix=" MB", nticks=5)
    return made


def waterfall(parts: Sequence[Part], total: Part, lower_is_better: bool, unit: str, colours: Palette) -> Figure:
    """What each factor adds to a change, end to end, with its interval; grey where it may be nothing at all."""
    made = figure(colours, 300)
    at = 0.0
    names, bases, sizes, shades, reach = [], [], [], [], []
    for part in (*parts, total):
        base = 0.0 if part is total else at
        good = (part.effect < 0) == lower_is_better
        names.append("change" if part is total else part.factor)
        bases.append(base)
        sizes.append(part.effect)
        shades.append((colours.good if good else colours.bad) if part.is_certain else colours.muted)
        reach.append((part.high - part.low) / 2)
        at += 0.0 if part is total else part.effect
    made.add_bar(
        x=names,
        y=sizes,
        base=bases,
        marker={"color": shades},
        error_y={"type": "data", "array": reach, "color": colours.text, "thickness": 1, "width": 4},
        text=[signed(size) for size in sizes],
        textposition="none",
        customdata=[f"{signed(size - r)} to {signed(size + r)} {unit}" for size, r in zip(sizes, reach, strict=True)],
        hovertemplate="%{x}: %{text} (%{customdata})<extra></extra>",
        cliponaxis=False,
    )
    for name, base, size, r in zip(names, bases, sizes, reach, strict=True):
        top = max(base, base + size + r)
        made.add_annotation(x=name, y=top, text=signed(size), showarrow=False, yshift=9, font={"size": 11})
    made.add_hline(y=0, line={"color": colours.muted, "width": 1})
    made.update_layout(hovermode="closest", bargap=0.35, margin={"t": 24})
    made.update_yaxes(nticks=6)
    return made
