"""What adapting costs the people who run it, beside what it brings."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app.components.context import heading
from app.components.tables import Columns, table


def panel(frame: pd.DataFrame, gain: float | None = None) -> None:
    """``frame``: one row a week, newest first, as ``operations_record`` gives it; ``gain`` over plain decoding."""
    if frame.empty:
        return
    number = st.column_config.NumberColumn
    with st.container(border=True, key="operations"):
        heading("Price of adaptivity", "what changing drafts costs in work, by week")
        st.markdown(sentence(frame.iloc[0], gain))
        columns: Columns = {
            "week": st.column_config.DateColumn("week of", format="MMM D"),
            "changes": number("changes", help="Rollouts that reached traffic"),
            "failures": number("change failures, %", format="%.0f", help="Rolled back, of those that ended"),
            "detect_s": number("time to detect, s", format="%.1f", help="Canary traffic to failing verdict, median"),
            "restore_s": number("time to restore, s", format="%.1f", help="Failing verdict to champion everywhere"),
            "canary_hours": number("hours in canary", format="%.2f"),
            "interventions": number("interventions", help="What people asked or wrote into the ledger themselves"),
        }
        shown = frame.assign(failures=100 * frame["failure_rate"].astype(float))
        table(shown[list(columns)], columns, "operations-weeks")


def sentence(week: pd.Series, gain: float | None = None) -> str:
    """The newest week in words, the gain of the window before it."""
    brings = f"Drafting brings **{gain:.2f} ×** plain decoding. " if gain is not None and not pd.isna(gain) else ""
    changes, failed, asked = int(week["changes"]), int(week["failed"]), int(week["interventions"])
    took = f"{_many(changes, 'change')} this week, {failed} rolled back"
    if failed and not pd.isna(week["detect_s"]):
        took += f", found after {_seconds(week['detect_s'])}"
        if not pd.isna(week["restore_s"]):
            took += f" and undone {_seconds(week['restore_s'])} later"
    return f"{brings}{took}; people stepped in {'once' if asked == 1 else f'{asked} times' if asked else 'never'}."


def _many(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _seconds(value: float) -> str:
    return f"{value / 60:.0f} min" if value >= 120 else f"{value:.1f} s"
