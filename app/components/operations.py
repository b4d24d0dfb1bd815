"""What adapting costs the people who run it, beside what it brings."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app.components.context import heading
from app.components.sheets import Column, number, sheet

COLUMNS = {
    "week": Column("week of", lambda week: f"{week:%b} {week.day}"),
    "changes": number("changes", "{:.0f}", note="Rollouts that reached traffic"),
    "failure_rate": number("change failures, %", "{:.0f}", 100.0, "Rolled back, of those that ended"),
    "detect_s": number("time to detect, s", "{:,.1f}", note="Canary traffic to failing verdict, median"),
    "restore_s": number("time to restore, s", "{:,.1f}", note="Failing verdict to champion everywhere"),
    "canary_hours": number("hours in canary", "{:,.2f}"),
    "interventions": number("interventions", "{:.0f}", note="What people asked or wrote into the ledger themselves"),
}


def panel(frame: pd.DataFrame, gain: float | None = None) -> None:
    """``frame``: one row a week, newest first, as ``operations_record`` gives it; ``gain`` over plain decoding."""
    if frame.empty:
        return
    with st.container(border=True, key="operations"):
        heading("Price of adaptivity", "what changing drafts costs in work, by week")
        st.markdown(sentence(frame.iloc[0], gain))
        sheet(frame, COLUMNS, "What changing drafts cost, by week")


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
