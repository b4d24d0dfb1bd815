"""Cards of the drift page: how many findings there are, the newest, and how each class stands."""

from __future__ import annotations

import numpy as np
import pandas as pd

from app.charts.theme import Palette, floats
from app.components.cards import card, row
from app.components.sparklines import sparkline

KINDS = {
    "input": "input drift",
    "new_traffic": "new traffic",
    "change_point": "change point",
    "silent_death": "silent death",
    "slow_slide": "slow slide",
}
CLASSES = 6
"""Classes that have a card, those with the most requests; the charts have all of them."""


def alarms(found: pd.DataFrame, totals: pd.DataFrame, trend: pd.DataFrame, newest: str, colours: Palette) -> str:
    """A row of cards as HTML. A class shows its acceptance length, how that moved, and what of it drifts.

    ``found``: findings, open ones first; ``totals`` and ``trend``: by traffic_class, of the window and over time;
    ``newest``: how long ago the newest finding was made, empty where there is none.
    """
    still = found[found["ended_at"].isna()] if len(found) else found
    ended = len(found) - len(still)
    kind = named(found["kind"].iloc[_newest(found)]) if newest else ""
    made = [
        card(
            "Open findings",
            f"{len(still)}",
            f"{ended} ended" if ended else "none" if still.empty else "in this window",
            colours.bad if len(still) else colours.muted,
        ),
        card("Newest finding", newest or "–", kind, colours.muted),
    ]
    if len(totals):
        shown = totals.sort_values("requests", ascending=False).head(CLASSES)
        for name, length in zip(shown["traffic_class"], floats(shown, "acceptance_length").tolist(), strict=True):
            kinds = still.loc[still["traffic_class"] == name, "kind"].tolist() if len(still) else []
            said = named(kinds[0]) + (f" +{len(kinds) - 1}" if len(kinds) > 1 else "") if kinds else "no alarm"
            moved = floats(trend[trend["traffic_class"] == name], "acceptance_length") if len(trend) else np.empty(0)
            shade = colours.bad if kinds else colours.muted
            line = sparkline(moved, colours.bad if kinds else colours.quantiles[1])
            made.append(card(f"{name} · length", "–" if np.isnan(length) else f"{length:.2f}", said, shade, line))
    return row(made)


def named(kind: str) -> str:
    """A kind of finding as a reader calls it."""
    return KINDS.get(kind, kind)


def _newest(found: pd.DataFrame) -> int:
    return int(found["found_at"].to_numpy().argmax())
