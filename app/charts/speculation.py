"""How well drafting does, and whether it pays. DataFrame → figure, pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from app.charts.figure import Figure
from app.charts.theme import Palette, Window, empty, figure, floats, instants, mark_deploys, time_axis

NOTHING = "Nothing was drafted in this window"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
PATTERNS = ("", "/", ".")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def by_class(
    frame: pd.DataFrame, column: str, plans: pd.DataFrame, window: Window, colours: Palette, form: str = ".2f"
) -> Figure:
    """One line a class. Classes are told apart by their dash, colour being kept for versions and judgement.

    ``frame``: at, traffic_class, ``column``.
    """
    values = floats(frame, column)
    if np.isnan(values).all():
        return empty(NOTHING, colours)
    made = figure(colours)
    at = instants(frame["at"]).to_numpy()
    for place, (name, chosen) in enumerate(_each_class(frame)):
        shade = colours.quantiles[place % 3]
        made.add_scatter(
            x=at[chosen],
            y=values[chosen],
            name=name,
            mode="lines",
            line={"width": 2, "color": shade, "dash": DASHES[place % len(DASHES)]},
            connectgaps=False,
            hovertemplate=f"%{{y:{form}}}",
        )
    made.update_layout(showlegend=True)
    made.update_yaxes(nticks=6)
    return mark_deploys(time_axis(made, window), plans, window, colours)


def share_by_class(frame: pd.DataFrame, plans: pd.DataFrame, window: Window, colours: Palette) -> Figure:
    """The mix of traffic: each class's share of the requests over time, %. ``frame``: at, traffic_class, requests."""
    requests = floats(frame, "requests")
    if np.isnan(requests).all():
        return empty("No traffic in this window", colours)
    made = figure(colours)
    at = instants(frame["at"]).to_numpy()
    _, bins = np.unique(at, return_inverse=True)
    whole = np.bincount(bins, weights=np.nan_to_num(requests))[bins]
    share = 100 * requests / np.where(whole > 0, whole, np.nan)
    for place, (name, chosen) in enumerate(_each_class(frame)):
        made.add_bar(
            x=at[chosen],
            y=share[chosen],
            name=name,
            marker={
                "color": colours.quantiles[place % 3],
                "pattern": {
                    "shape": PATTERNS[place // 3 % len(PATTERNS)],
                    "solidity": 0.4,
                    "fgcolor": colours.card,
                    "fillmode": "overlay",  # on the colour, not in its place
                },
            },
            hovertemplate="%{y:.0f} %",
        )
    made.update_layout(barmode="stack", bargap=0.08, showlegend=True)
    made.update_yaxes(range=[0, 100], ticksuffix=" %", nticks=5)
    return mark_deploys(time_axis(made, window), plans, window, colours, width=520, over=True)


def positions_by_class(frame: pd.DataFrame, colours: Palette) -> Figure:
    """Unconditional acceptance by draft position, %, a line a class. ``frame``: traffic_class, position, acceptance."""
    acceptance = floats(frame, "acceptance")
    if np.isnan(acceptance).all():
        return empty(NOTHING, colours)
    made = figure(colours)
    positions = frame["position"].to_numpy()
    for place, (name, chosen) in enumerate(_each_class(frame)):
        made.add_scatter(
            x=positions[chosen] + 1,
            y=acceptance[chosen] * 100,
            name=name,
            mode="lines+markers",
            line={"width": 2, "color": colours.quantiles[place % 3], "dash": DASHES[place % len(DASHES)]},
            hovertemplate="%{y:.1f} %",
        )
    made.update_layout(showlegend=True)
    made.update_xaxes(dtick=1, tickformat="d")
    made.update_yaxes(ticksuffix=" %", rangemode="tozero", nticks=6)
    return made


def distribution(frame: pd.DataFrame, band: tuple[float, float] | None, colours: Palette) -> Figure:
    """Requests by their own acceptance length, % of each version's, with the band outside which is unusual.

    ``frame``: policy_version, acceptance_length, requests. ``band``: what .5 % and 99.5 % stayed under the week before.
    """
    if frame.empty:
        return empty(NOTHING, colours)
    made = figure(colours)
    step = 0.1
    versions, lengths, requests = (frame[c].to_numpy() for c in ("policy_version", "acceptance_length", "requests"))
    places = np.floor(lengths.astype(float) / step + 1e-6).astype(int)
    for version in np.unique(versions):
        chosen = versions == version
        first = places[chosen].min()
        counts = np.bincount(places[chosen] - first, weights=requests[chosen].astype(float))
        made.add_scatter(
            x=(first + np.arange(len(counts)) + 0.5) * step,
            y=counts / counts.sum() * 100,
            name=f"v{version}",
            mode="lines",
            line={"width": 2, "color": colours.version(int(version)), "shape": "hvh"},
            hovertemplate="%{y:.1f} % of requests",
        )
    if band is not None:
        right = max(float(frame["acceptance_length"].max()) * 1.05, band[1] * 1.05)
        for begin, end in ((1.0, band[0]), (band[1], right)):
            made.add_vrect(x0=begin, x1=end, fillcolor=colours.warn, opacity=0.12, line={"width": 0}, layer="below")
        for at, text in ((band[0], "too low"), (band[1], "too high")):
            made.add_vline(
                x=at,
                line={"color": colours.warn, "width": 1, "dash": "dot"},
                annotation={"text": text, "font": {"size": 10, "color": colours.warn}, "yanchor": "bottom"},
            )
    made.update_layout(showlegend=True)
    made.update_xaxes(nticks=7)
    made.update_yaxes(ticksuffix=" %", rangemode="tozero", nticks=5)
    return made


def cost(frame: pd.DataFrame, colours: Palette) -> Figure:
    """What a verify step costs against what it brings: above the line drafting pays.

    ``frame``: policy_version, traffic_class, break_even (cost of a step, in plain steps), acceptance_length, requests,
    gain (plain decoding's time over the time spent), predicted_gain (the same as K control expected it, or None).
    """
    known = frame.dropna(subset=["break_even", "acceptance_length"]) if not frame.empty else frame
    if known.empty:
        return empty("Step costs are not known: nothing was decoded plainly here", colours)
    made = figure(colours)
    top = max(float(known["break_even"].max()), float(known["acceptance_length"].max())) * 1.12
    made.add_scatter(
        x=[1, top], y=[1, top], mode="lines", line={"color": colours.muted, "dash": "dot", "width": 1},
        hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    made.add_annotation(
        x=top, y=top, text="break-even", showarrow=False, xanchor="right", yanchor="bottom",
        font={"size": 10, "color": colours.muted},
    )  # fmt: skip
    most = float(known["requests"].max())
    symbols = dict(zip(sorted(known["traffic_class"].unique()), SYMBOLS * 99, strict=False))
    for version, rows in known.groupby("policy_version"):
        made.add_scatter(
            x=rows["break_even"],
            y=rows["acceptance_length"],
            name=f"v{version}",
            mode="markers",
            text=rows["traffic_class"],
            marker={
                "symbol": [symbols[name] for name in rows["traffic_class"]],
                "color": colours.version(int(version)),
                "size": [8 + 14 * math.sqrt(n / most) for n in rows["requests"]],
                "line": {"width": 1, "color": colours.card},
            },
            customdata=[_gains(*pair) for pair in zip(rows["gain"], rows["predicted_gain"], strict=True)],
            hovertemplate="%{text}: a step costs %{x:.2f} plain steps and brings %{y:.2f} tokens<br>%{customdata}"
            "<extra></extra>",
        )
    made.update_layout(showlegend=True, hovermode="closest")
    made.update_xaxes(
        showgrid=True, gridcolor=colours.grid, nticks=6, title=_axis("cost of a step, plain steps", colours)
    )
    made.update_yaxes(nticks=6, title=_axis("tokens a step", colours))
    return made


def _gains(observed: float, predicted: float) -> str:
    text = f"{observed:.2f} × plain decoding"
    return text if pd.isna(predicted) else f"{text}; K control expected {predicted:.2f} ×"


def _axis(text: str, colours: Palette) -> dict[str, object]:
    return {"text": text, "font": {"size": 11, "color": colours.muted}}


def _each_class(frame: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """(class, which rows are its own), by name."""
    classes = frame["traffic_class"].to_numpy(dtype=object)
    for name in sorted(set(classes)):
        yield str(name), classes == name
