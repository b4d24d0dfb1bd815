"""How sure a rollout is of its canary, over time."""

from __future__ import annotations

import pandas as pd

from app.charts.figure import Figure
from app.charts.theme import Palette, empty, figure, instants, log_axis


def certainty(frame: pd.DataFrame, canary: int, colours: Palette, height: int = 280) -> Figure:
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


def boundaries(frame: pd.DataFrame, colours: Palette, height: int = 280) -> Figure:
    """Each guard's evidence against the canary over time, % of what rolls back.

    ``frame``: at, guard, near (log E / log of its limit; 1 rolls back, below 0 the evidence is for the canary).
    """
    frame = frame.dropna(subset=["near"])
    if frame.empty:
        return empty("No guard has evidence yet", colours, height)
    made = figure(colours, height)
    shades = [colours.versions[k % len(colours.versions)] for k in (1, 2, 3, 4, 5, 6, 7, 8, 0)]
    for place, (guard, rows) in enumerate(frame.groupby("guard", sort=False)):
        made.add_scatter(
            x=instants(rows["at"]),
            y=100 * rows["near"].clip(-1.0, 1.5),
            mode="lines+markers" if len(rows) == 1 else "lines",
            line={"width": 1.8, "color": shades[place % len(shades)]},
            name=str(guard),
            hovertemplate="%{y:.0f} %",
        )
    made.add_hline(y=0, line={"color": colours.muted, "width": 1})
    made.add_hline(
        y=100,
        line={"color": colours.bad, "width": 1, "dash": "dot"},
        annotation={"text": "rolls back", "font": {"size": 10, "color": colours.bad}, "xanchor": "right"},
    )
    top = max(1.15, float(frame["near"].clip(upper=1.5).max()) + 0.1)
    made.update_yaxes(ticksuffix=" %", range=[-110, 100 * top])
    made.update_xaxes(tickformat="%H:%M", nticks=6, hoverformat="%b %-d, %H:%M:%S")
    return made


def quantile_curves(frame: pd.DataFrame, canary: int, champion: int, colours: Palette, height: int = 280) -> Figure:
    """Latency against the share of requests that took no longer, both arms.

    ``frame``: arm ("canary" or "control"), level in (0, 1), ms.
    """
    frame = frame.dropna(subset=["ms"])
    frame = frame[frame["ms"] > 0]
    if frame.empty:
        return empty("No latency of either arm yet", colours, height)
    made = figure(colours, height)
    for arm, version, dash in (("control", champion, "dot"), ("canary", canary, "solid")):
        rows = frame[frame["arm"] == arm]
        made.add_scatter(
            x=100 * rows["level"],
            y=rows["ms"],
            mode="lines",
            line={"width": 2, "color": colours.version(version), "dash": dash},
            name=f"{arm} v{version}",
            hovertemplate="%{y:,.0f} ms",
        )
    log_axis(made, float(frame["ms"].min()), float(frame["ms"].max()))
    made.update_xaxes(
        range=[0, 100], tickvals=[1, 25, 50, 75, 90, 99], ticktext=["p1", "p25", "p50", "p75", "p90", "p99"]
    )
    made.update_xaxes(hoverformat=".0f", tickprefix="")
    return made


def faint(colour: str) -> str:
    """A hex colour, thin enough to see through."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.16)"
