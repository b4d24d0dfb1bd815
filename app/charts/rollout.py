"""How sure a rollout is of its canary, over time."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from app.charts.theme import Palette, empty, figure, instants


def certainty(frame: pd.DataFrame, canary: int, colours: Palette, height: int = 280) -> go.Figure:
    """Tokens per verify step, canary minus control, with its confidence sequence (valid at every look).

    ``frame``: at, difference, low, high, allowed (the drop the guard tolerates, as a negative difference).
    """
    if frame.empty or frame["difference"].isna().all():
        return empty("The guard has not seen enough requests yet", colours, height)
    made = figure(colours, height)
    colour = colours.version(canary)
    band = frame.dropna(subset=["low", "high"])
    single = len(frame) == 1
    if len(band):
        edge = {"width": 0, "color": colour}
        made.add_scatter(
            x=instants(band["at"]), y=band["high"], mode="lines", line=edge, showlegend=False, name="upper bound"
        )
        made.add_scatter(
            x=instants(band["at"]),
            y=band["low"],
            mode="lines",
            line=edge,
            fill="tonexty",
            fillcolor=faint(colour),
            name="lower bound",
            showlegend=False,
        )
    made.add_scatter(
        x=instants(frame["at"]),
        y=frame["difference"],
        mode="lines+markers" if single else "lines",
        line={"width": 2, "color": colour},
        name=f"v{canary} − control",
        showlegend=False,
    )
    made.update_traces(hovertemplate="%{y:+.2f}")
    made.add_hline(y=0, line={"color": colours.muted, "width": 1})
    if (allowed := frame["allowed"].dropna()).size:
        made.add_hline(
            y=float(allowed.iloc[-1]),
            line={"color": colours.bad, "width": 1, "dash": "dot"},
            annotation={
                "text": "allowed drop",
                "font": {"size": 10, "color": colours.bad},
                "xanchor": "right",
                "yanchor": "top",
            },
        )
    made.update_layout(margin={"t": 12})
    made.update_yaxes(tickformat="+.1f", nticks=6)
    made.update_xaxes(tickformat="%H:%M", nticks=6, hoverformat="%b %-d, %H:%M:%S")
    return made


def faint(colour: str) -> str:
    """A hex colour, thin enough to see through."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.16)"
