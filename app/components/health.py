"""Cards of the system page: whether anything waits, is lost or is late."""

from __future__ import annotations

import numpy as np
import pandas as pd

from app.charts.theme import Palette, floats
from app.components.cards import card, row


def health(
    writers: pd.DataFrame, exporter: pd.DataFrame, waiting: pd.DataFrame, stored: pd.DataFrame, colours: Palette
) -> str:
    """A row of cards as HTML. The frames are those of the page's panels: a row a replica, what is exported, all deltas
    that wait, a day."""
    queue, spilled, set_aside, dropped = (
        _whole(writers, name) for name in ("queue", "spill_files", "set_aside", "dropped")
    )
    lag = floats(exporter, "lag_s")
    known = lag[~np.isnan(lag)]
    behind = f"{known.max():,.0f} s" if len(known) else "–"
    deltas = _whole(waiting, "deltas_waiting")
    lost = colours.bad if dropped or set_aside else colours.muted
    made = [
        card("Replicas", f"{len(writers):,}", "heard of lately" if len(writers) else "none", colours.muted),
        card("Queue", f"{queue:,}", "traces to be written", colours.muted),
        card("Spill", f"{spilled:,}", "batches on disk", colours.bad if spilled else colours.muted),
        card("Dropped", f"{dropped:,}", f"{set_aside:,} set aside", lost),
        card("MLflow lag", behind, "", colours.muted),
        card("Rollups", f"{deltas:,}", "deltas not compacted", colours.muted),
        card("Stored", f"{_megabytes(stored):,.0f} MB", f"{len(stored)} days", colours.muted),
    ]
    return row(made, is_low=True)


def _whole(frame: pd.DataFrame, column: str) -> int:
    return int(pd.to_numeric(frame[column]).fillna(0).sum()) if len(frame) else 0


def _megabytes(stored: pd.DataFrame) -> float:
    sizes = stored.filter(like="_bytes")
    return float(sizes.apply(pd.to_numeric).sum().sum()) / 1e6
