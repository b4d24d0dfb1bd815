"""The parts of the rollouts page: slice, guard table, log, and the buttons with their confirmation."""

from __future__ import annotations

import uuid
from typing import Any

import pandas as pd
import streamlit as st

from app.queries import ledger
from app.queries.ledger import Serving
from engine.contracts import CANARY, RolloutState, Verdict
from engine.store.repositories.rollouts import DecisionRecord, Rollout

ICONS = {
    Verdict.PASS: ":green[:material/check_circle:]",
    Verdict.FAIL: ":red[:material/cancel:]",
    Verdict.INSUFFICIENT: ":gray[:material/hourglass_empty:]",
    Verdict.STALE: ":orange[:material/schedule:]",
    Verdict.ERROR: ":orange[:material/error:]",
}
ROLL_BACK = "roll_back"
ASKED = {
    ROLL_BACK: "Takes effect at the next step of every replica, without the controller.",
    "promote": "The controller makes the canary champion unless a guard fails.",
    "hold": "Keeps the present weights. Guards stay on.",
    "resume": "Lets the rollout go on from where it was held.",
}
LABELS = {ROLL_BACK: "Roll back", "promote": "Promote", "hold": "Hold", "resume": "Resume"}


def slice_now(serving: Serving, observed: float | None) -> None:
    """Arms with three weights: what the ledger asks for, what replicas have taken, what traffic shows."""
    plan = serving.plan
    assert plan is not None
    behind = [r.replica_id for r in serving.replicas if (r.observed_generation or 0) < plan.generation]
    rest = 1.0 - sum(arm.weight for arm in plan.arms)
    rows: list[dict[str, Any]] = [{"arm": "champion", "version": f"v{plan.champion}", "desired": rest}]
    rows += [{"arm": a.name, "version": f"v{a.policy_version}", "desired": a.weight} for a in plan.arms]
    for row in rows:
        row["acknowledged"] = None if behind or not serving.replicas else row["desired"]
        row["observed"] = observed if row["arm"] == CANARY else None
    number = st.column_config.NumberColumn
    columns = {
        "desired": number("desired", format="percent", help="What the ledger asks for"),
        "acknowledged": number("acknowledged", format="percent", help="What every live replica routes by"),
        "observed": number("observed", format="percent", help="Share of requests since this step began"),
    }
    st.dataframe(pd.DataFrame(rows), column_config=columns, hide_index=True, key="arms")
    if behind:
        st.warning(f"Generation {plan.generation} is not yet observed by {', '.join(behind)}.")


def guard_table(decision: DecisionRecord) -> None:
    """What each guard saw, and how far it is from its limit."""
    rows = [
        {
            "verdict": guard["verdict"],
            "guard": guard["guard"].replace("_", " "),
            "segment": guard["segment"],
            "n canary": guard["n_canary"],
            "n control": guard["n_control"],
            "canary": guard["canary"],
            "control": guard["control"],
            "low": guard["low"],
            "high": guard["high"],
            "log E": guard["log_e"],
            "limit": guard["limit"],
            "because": guard["reason"],
        }
        for guard in decision.evidence.get("guards", [])
    ]
    if not rows:
        st.caption("No guard has been evaluated yet: the canary has not served.")
        return
    number = st.column_config.NumberColumn
    columns = {name: number(name, format="%.3f") for name in ("canary", "control", "low", "high", "log E", "limit")}
    columns["low"] = number("low", format="%.3f", help="Confidence sequence of the difference, valid at every look")
    frame = pd.DataFrame(rows).style.map(_judgement, subset=["verdict"])
    st.dataframe(frame, column_config=columns, hide_index=True, key="guards")


def _judgement(verdict: str) -> str:
    """The colour of a verdict: only PASS and FAIL judge."""
    return {"PASS": "color: #1f9d6b", "FAIL": "color: #d6455d; font-weight: 600"}.get(verdict, "")


def steps(rollout: Rollout) -> str:
    """Where a rollout is on its way, as one line."""
    state = RolloutState(rollout.state)
    stages = rollout.status.get("stages", [])
    planned = [f"{weight:.0%}" for weight in rollout.spec.get("steps", [])]
    done = [f":blue[{text}]" if at < len(stages) else f":gray[{text}]" for at, text in enumerate(planned)]
    return f"{' → '.join(done)} → {'**promoted**' if state in _WON else ':gray[promoted]'}"


_WON = {RolloutState.PROMOTED, RolloutState.WATCHING, RolloutState.DONE}


def log(decisions: list[DecisionRecord]) -> None:
    """Every turn and every minute's verdict, newest first."""
    frame = pd.DataFrame(
        [
            {
                "at": d.decided_at,
                "from": d.from_state.value,
                "to": d.to_state.value,
                "verdict": d.verdict.value,
                "action": d.action.replace("_", " "),
                "because": d.reason,
            }
            for d in reversed(decisions)
        ]
    )
    columns = {"at": st.column_config.DatetimeColumn("at", format="MMM D, HH:mm:ss")}
    st.dataframe(frame, column_config=columns, hide_index=True, key="decisions", height=260)


def buttons(serving: Serving) -> None:
    """The verbs. What is pressed opens a confirmation; the write happens there, once."""
    rollout, plan = serving.rollout, serving.plan
    with st.container(horizontal=True):
        if rollout is not None:
            held = RolloutState(rollout.state) is RolloutState.HELD
            _button("promote", rollout)
            _button("resume" if held else "hold", rollout)
        if plan is not None and (plan.arms or serving.previous is not None):
            target = plan.rollback_to or (plan.champion if plan.arms else serving.previous)
            if st.button(
                f"Roll back to v{target}", key=ROLL_BACK, type="primary", icon=":material/undo:", help=ASKED[ROLL_BACK]
            ):
                confirm(ROLL_BACK, None)


def effect() -> None:
    """After a rollback: when the replicas began to route by it."""
    generation = st.session_state.get("rolled_back")
    if generation is None:
        return
    seen, live, seconds = ledger.time_to_effect(generation)
    if seconds is None:
        st.warning(f"Generation {generation} is in the ledger. No replica has observed it yet.")
    else:
        text = f"Rolled back: effective on {seen} of {live} replicas after {seconds:.2f} s (generation {generation})."
        (st.success if seen >= live else st.warning)(text)


@st.dialog("Are you sure?")
def confirm(verb: str, rollout_id: int | None) -> None:
    """One key for this dialog: pressing twice, or a repeated request, writes once."""
    key = st.session_state.setdefault(f"intent-{verb}-{rollout_id}", f"dashboard-{uuid.uuid4().hex}")
    st.write(ASKED[verb])
    reason = st.text_input("Reason", key="reason", placeholder="It stays in the record", max_chars=200)
    with st.container(horizontal=True):
        st.button(
            LABELS[verb],
            key="confirm",
            type="primary",
            disabled=not reason.strip(),
            on_click=_write,
            args=(verb, rollout_id, key),
        )
        st.button("Cancel", key="cancel")


def _write(verb: str, rollout_id: int | None, key: str) -> None:
    """Runs before the page is drawn again, so the page shows what was done."""
    reason = str(st.session_state["reason"]).strip()
    if verb == ROLL_BACK:
        st.session_state["rolled_back"] = ledger.roll_back(reason, key).generation
    else:
        assert rollout_id is not None
        ledger.command(rollout_id, verb, reason, key)
        st.toast(f"Asked the controller to {verb} rollout {rollout_id}.")
    st.session_state.pop(f"intent-{verb}-{rollout_id}", None)


def _button(verb: str, rollout: Rollout) -> None:
    icons = {"promote": ":material/trending_up:", "hold": ":material/pause:", "resume": ":material/play_arrow:"}
    if st.button(LABELS[verb], key=verb, icon=icons[verb], help=ASKED[verb]):
        confirm(verb, rollout.id)
