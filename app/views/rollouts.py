"""What is being tried, on which slice, what the guards say, and the buttons."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app.charts import latency
from app.charts.theme import CONFIG
from app.components import context, rollout
from app.queries import ledger, overview
from engine.contracts import CANARY, CONTROL, Verdict

current = context.bar()


def page() -> None:
    serving = ledger.serving()
    if serving.plan is None:
        st.info("No engine has started yet, so nothing is served. Run `slipstream up`.", icon=":material/info:")
        return
    active = serving.rollout
    decisions = ledger.decisions(active.id) if active is not None else []
    newest = decisions[-1] if decisions else None
    st.markdown(_sentence(serving))
    rollout.effect()
    rollout.buttons(serving)
    left, right = st.columns([2, 5])
    with left.container(border=True, height="stretch"):
        st.markdown(f"**Serving** generation {serving.plan.generation}")
        observed = newest.evidence.get("weights", {}).get("observed") if newest is not None else None
        rollout.slice_now(serving, observed)
        if active is not None:
            st.markdown(rollout.steps(active))
    with right.container(border=True, height="stretch"):
        st.markdown("**Guards** set before the start, evaluated on every tick")
        if newest is not None:
            rollout.guard_table(newest)
        else:
            st.caption(
                "No rollout is active. `slipstream rollout start VERSION` begins one; "
                "so does a policy that passed its gate."
            )
    if active is not None:
        _arms()
    with st.container(border=True):
        st.markdown("**Rollouts** newest first; choose one to read its decisions")
        _history()


def _sentence(serving: ledger.Serving) -> str:
    active, plan = serving.rollout, serving.plan
    assert plan is not None
    if active is None:
        return (
            f"**v{plan.champion}** serves everybody; no rollout is active. Last change: {plan.reason} ({plan.actor})."
        )
    icon = rollout.ICONS.get(Verdict(active.status.get("verdict", "INSUFFICIENT")), "")
    return (
        f"{icon} **{active.name}** against v{active.champion}: {active.state.value}. {active.status.get('reason', '')}."
    )


def _arms() -> None:
    """Canary and control side by side over the chosen window."""
    here = current()
    frame = overview.over_time(here.part, ("arm", "policy_version"))
    if frame.empty:
        return
    frame = frame[frame["arm"].isin((CANARY, CONTROL))]
    marks = ledger.marks(here.part)
    columns = st.columns(2)
    for place, column, title, suffix in (
        (columns[0], "acceptance_length", "**Acceptance length** canary against control", ""),
        (columns[1], "e2e_p95", "**p95 end-to-end latency** canary against control, ms", " ms"),
    ):
        with place.container(border=True):
            st.markdown(title)
            figure = latency.by_version(frame, column, marks, here.colours, suffix)
            st.plotly_chart(figure, key=f"arms-{column}", config=CONFIG, theme=None)


def _history() -> None:
    found = ledger.all_rollouts()
    if not found:
        st.caption("None yet.")
        return
    rows = [
        {
            "id": r.id,
            "name": r.name,
            "canary": f"v{r.canary}",
            "champion at start": f"v{r.champion}",
            "state": r.state.value,
            "by": r.actor,
            "began": r.created_at,
            "minutes": (r.updated_at - r.created_at).total_seconds() / 60,
            "because": r.status.get("reason", ""),
        }
        for r in found
    ]
    columns = {
        "began": st.column_config.DatetimeColumn("began", format="MMM D, HH:mm:ss"),
        "minutes": st.column_config.NumberColumn("minutes", format="%.1f"),
    }
    event = st.dataframe(
        pd.DataFrame(rows),
        column_config=columns,
        hide_index=True,
        key="history",
        on_select="rerun",
        selection_mode="single-row",
    )
    chosen = event.selection.rows[0] if event.selection.rows else 0
    if chosen < len(found):
        one = found[chosen]
        st.markdown(f"**Decisions** of {one.name} ({one.state.value})")
        rollout.log(ledger.decisions(one.id))


context.live(page)
