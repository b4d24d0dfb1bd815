"""Cards of the system page: whether anything waits, is lost or is late."""

from __future__ import annotations

import numpy as np
import pandas as pd

from app.charts.theme import Palette, floats
from app.components.cards import card, row
from app.components.sheets import MISSING


def health(
    writers: pd.DataFrame, exporter: pd.DataFrame, waiting: pd.DataFrame, stored: pd.DataFrame, colours: Palette
) -> str:
    """A row of cards as HTML. The frames are those of the page's panels: a row a replica, what is exported, all deltas
    that wait, a day."""
    queue, spilled, set_aside, dropped = (
        _sum(writers, name) for name in ("queue", "spill_files", "set_aside", "dropped")
    )
    known = floats(exporter, "lag_s")
    known = known[~np.isnan(known)]
    behind = f"{known.max():,.0f} s" if len(known) else MISSING
    lost = colours.bad if dropped or set_aside else colours.muted
    made = [
        card("Replicas", f"{len(writers):,}", "" if len(writers) else "none heard of", colours.muted),
        card("Queue", _written(queue), "traces", colours.muted),
        card("Spill", _written(spilled), "batches", colours.bad if spilled else colours.muted),
        card("Dropped", _written(dropped), f"{_written(set_aside)} set aside", lost),
        card("MLflow lag", behind, "", colours.muted),
        card("Not compacted", _written(_sum(waiting, "deltas_waiting")), "deltas", colours.muted),
        card(
            "Stored",
            f"{_megabytes(stored):,.0f} MB",
            "of 1 day" if len(stored) == 1 else f"of {len(stored)} days",
            colours.muted,
        ),
    ]
    return row(made, is_low=True)


def _sum(frame: pd.DataFrame, column: str) -> float | None:
    """None where no row has a value: unknown is not nothing."""
    values = pd.to_numeric(frame[column]).dropna() if len(frame) else ()
    return float(sum(values)) if len(values) else None


def _written(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def _megabytes(stored: pd.DataFrame) -> float:
    sizes = stored.filter(like="_bytes")
    return float(sizes.apply(pd.to_numeric).sum().sum()) / 1e6
