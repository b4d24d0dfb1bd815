"""The decisions about a rollout, and all of them made again from their evidence."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app.charts.theme import Palette
from app.components.context import heading
from app.components.guard_table import by_verdict
from app.components.tables import Columns, table
from app.queries import rehearsal
from engine.rollout.replay import Replayed
from engine.store.repositories.rollouts import DecisionRecord, Rollout

REPLAYED = "replayed"


def panel(one: Rollout, decisions: list[DecisionRecord], colours: Palette) -> None:
    """Every turn and every minute's verdict, newest first; a press makes them all again."""
    with st.container(horizontal=True, vertical_alignment="center"):
        heading(f"Decisions on v{one.canary}", f"rollout {one.id}, each with its evidence in the ledger")
        pressed = st.button(
            "Replay", key=f"replay-{one.id}", icon=":material/replay:", disabled=not decisions,
            help="Makes every decision again from its own evidence and compares",
        )  # fmt: skip
    if pressed:
        with st.spinner("Making every decision again…"):  # kept at once: a refresh may end this run
            st.session_state[REPLAYED] = (one.id, rehearsal.replayed(one.id))
    rollout_id, made = st.session_state.get(REPLAYED, (None, None))
    if made is not None and rollout_id == one.id:
        _say(made)
    _log(decisions, colours)


def _say(made: Replayed | str) -> None:
    if isinstance(made, str):
        st.error(made, icon=":material/error:")
        return
    if not made.judged:
        st.info("None of its decisions was made of evidence that could be judged again.", icon=":material/info:")
        return
    if made.agrees:
        st.success(f"All {made.judged:,} decisions come out as recorded.", icon=":material/check_circle:")
        return
    lost = f" {len(made.unreadable):,} cannot be read by this version of the code." if made.unreadable else ""
    differ = made.judged - made.same - len(made.unreadable)
    said = f"{made.same:,} of {made.judged:,} decisions come out as recorded, {differ:,} do not.{lost}"
    (st.error if differ else st.warning)(said, icon=":material/error:")
    if made.differing:
        table(differing(made), DIFFERING, "replayed-differing")


DIFFERING: Columns = {
    "decision": st.column_config.NumberColumn("decision", width="small"),
    "stored": st.column_config.TextColumn("the record says", width="large"),
    "replayed": st.column_config.TextColumn("made again", width="large"),
}


def differing(made: Replayed) -> pd.DataFrame:
    """(decision, stored, replayed) of those that differ from their record, or from the decision before."""
    return pd.DataFrame(
        [
            {"decision": one.decision_id, "stored": ", ".join(one.stored), "replayed": ", ".join(one.replayed)}
            for one in made.differing
        ]
    )


def _log(decisions: list[DecisionRecord], colours: Palette) -> None:
    frame = pd.DataFrame(
        [
            {
                "at": d.decided_at,
                "verdict": d.verdict.value,
                "state": d.to_state.value if d.from_state is d.to_state else f"{d.from_state} → {d.to_state}",
                "action": "" if d.action == "none" else d.action.replace("_", " "),
                "because": d.reason,
            }
            for d in reversed(decisions)
        ]
    )
    if frame.empty:
        st.caption("No decision yet. The controller writes the first one when it has looked at the rollout.")
        return
    columns = {
        "at": st.column_config.DatetimeColumn("at", format="MMM D, HH:mm:ss"),
        "because": st.column_config.TextColumn("because", width="large"),
    }
    height = min(38 * (len(frame) + 1) + 2, 300)
    table(frame, columns, "decisions", {"verdict": by_verdict(colours)}, height=height)
