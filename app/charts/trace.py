"""One trace: where its time went, and what each verify step brought."""

from __future__ import annotations

from collections.abc import Sequence

from app.charts.figure import Figure
from app.charts.theme import Palette, empty, figure


def waterfall(parts: Sequence[tuple[str, float, float]], colours: Palette) -> Figure:
    """``parts``: (name, start, duration), milliseconds; drawn from the top."""
    if not parts:
        return empty("No times were kept for this request", colours, 170)
    made = figure(colours, 60 + 26 * len(parts))
    made.add_bar(
        y=[name for name, _, _ in parts],
        x=[duration for _, _, duration in parts],
        base=[start for _, start, _ in parts],
        orientation="h",
        marker={"color": [colours.quantiles[0] if "sum" in name else colours.quantiles[1] for name, _, _ in parts]},
        text=[f"{duration:,.1f} ms" for _, _, duration in parts],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    end = max(start + duration for _, start, duration in parts)
    made.update_layout(hovermode="closest", bargap=0.4, margin={"t": 8, "r": 12})
    made.update_xaxes(nticks=5, ticksuffix=" ms", range=[0, end * 1.22], showgrid=True, gridcolor=colours.grid)
    made.update_yaxes(autorange="reversed", showgrid=False)
    return made


def steps(drafted: Sequence[int], accepted: Sequence[int], colours: Palette) -> Figure:
    """Drafted and accepted tokens of each verify step."""
    if not drafted:
        return empty("No verify step", colours, 170)
    made = figure(colours, 190)
    numbers = list(range(1, len(drafted) + 1))
    made.add_bar(x=numbers, y=list(drafted), name="drafted", marker={"color": colours.quantiles[0]})
    made.add_bar(x=numbers, y=list(accepted), name="accepted", marker={"color": colours.quantiles[2]})
    made.update_layout(showlegend=True, bargap=0.15, margin={"t": 30})
    made.update_xaxes(title={"text": "verify step", "font": {"size": 11, "color": colours.muted}})
    made.update_xaxes(range=[0.3, max(len(drafted), 12) + 0.7], nticks=8, tickformat="d")
    made.update_yaxes(dtick=1 if max(drafted) < 8 else 2, rangemode="tozero")
    return made
