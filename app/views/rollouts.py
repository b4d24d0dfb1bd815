"""What is being tried, on which slice, what the guards say, and the buttons."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app.charts import latency
from app.charts import rollout as charts
from app.charts.theme import Palette
from app.components import context, decision_log, guard_table, operations, rollout, verbs
from app.components.context import Context, heading, plain
from app.components.drawing import draw, draw_to_traces
from app.components.export import export
from app.components.shared import shared
from app.components.tables import Columns, by_identity, table
from app.queries import ledger, overview
from engine.contracts import CANARY, CONTROL, RolloutState
from engine.store.repositories.rollouts import DecisionRecord, Rollout

current = context.bar()


def head() -> None:
    """What stands, what came of the last press, and what the controller has yet to answer."""
    serving = ledger.serving()
    context.headline(_sentence(serving))
    verbs.effect()
    for command in serving.waiting:
        st.info(
            f"{plain(command.actor)} asked to {command.verb}: {plain(command.reason)}. "
            "The controller answers at its next tick.",
            icon=":material/hourglass_empty:",
        )


def page() -> None:
    serving = ledger.serving()
    if serving.plan is None:
        st.info("Nothing is served yet. Start an engine with `slipstream up`.", icon=":material/info:")
        return
    verbs.follow(serving)
    here = current()
    active = serving.rollout
    decisions = ledger.decisions(active.id) if active is not None else []
    left, right = st.columns([2, 5])
    with left.container(border=True, height="stretch"):
        heading("Serving now", f"generation {serving.plan.generation}, share of eligible traffic")
        counts = ledger.observed(serving.plan.generation, serving.plan.created_at)
        rollout.slice_now(serving, counts, here.colours)
        if active is not None:
            st.html(rollout.steps(active, here.colours))
    with right.container(border=True, height="stretch"):
        heading("Guards", "set before the start, evaluated on every tick")
        _guards(active, decisions, _newest(decisions), here.colours)


def record() -> None:
    """What it was judged by, and all that was tried before."""
    serving = ledger.serving()
    if serving.plan is None:
        return
    here, active = current(), serving.rollout
    if active is not None:
        decisions = ledger.decisions(active.id)
        _evidence(active, decisions, "active", active.id, _newest(decisions), here.colours)
        _arms(here.charted(), serving.plan.generation)
    with st.container(border=True):
        heading("Rollouts", "newest first; choose one to read its decisions")
        _history()
    operations.panel(ledger.operations_record())
    export("rollouts", here.part)


def _newest(decisions: list[DecisionRecord]) -> int | None:
    """The decision that all panels of a rollout are as of: decisions are only ever added."""
    return decisions[-1].id if decisions else None


@shared
def _guards(_active: Rollout | None, _decisions: list[DecisionRecord], newest: int | None, colours: Palette) -> None:
    judged = [decision for decision in _decisions if decision.evidence.get("guards")]
    if _active is not None and judged:
        guard_table.guard_table(judged[-1], _active, ledger.counts(_active.id, newest), colours)
    else:
        st.caption(
            "No guard has anything to judge. `slipstream rollout start VERSION` begins a rollout; "
            "so does a policy that passes its gate."
        )


def _sentence(serving: ledger.Serving) -> str:
    active, plan = serving.rollout, serving.plan
    if plan is None:
        return "No engine has started yet. Run `slipstream up`."
    if active is None:
        return f"**v{plan.champion}** serves all traffic; no rollout is active. Last change: {plain(plan.reason)}."
    canary, reason = plan.canary, plain(active.status.get("reason"))
    if plan.champion == active.canary:
        state = active.state.value.lower().replace("_", " ")
        return f"**v{active.canary}** took over from **v{active.champion}**, {state}: {reason}."
    if canary is None and active.status.get("stages"):
        seen = serving.acknowledged is not None and serving.acknowledged.generation >= plan.generation
        serves = "serves all traffic" if seen else "takes all traffic back, not seen on every replica yet"
        return f"**v{plan.champion}** {serves}. Canary **v{active.canary}** was taken back: {plain(plan.reason)}."
    share = f"takes {canary.weight * 100:g} %" if canary is not None else "takes no traffic"
    state = active.state.value.lower().replace("_", " ")
    return f"Canary **v{active.canary}** {share} against **v{active.champion}**, {state}: {reason}."


@shared
def _arms(here: Context, generation: int | None) -> None:
    """Canary and control side by side over the chosen window."""
    frame = overview.over_time(here.part, ("arm", "policy_version"), ("e2e",))
    if not frame.empty:
        frame = frame[frame["arm"].isin((CANARY, CONTROL))]
    marks = ledger.marks(here.part, generation)
    columns = st.columns(2)
    with columns[0].container(border=True):
        heading("Acceptance length", "canary and control arms")
        figure = latency.by_version(frame, "acceptance_length", marks, here.window, here.colours)
        draw_to_traces(figure, "arms-acceptance", "Acceptance length of canary and control over time.")
    with columns[1].container(border=True):
        heading("p95 end-to-end latency", "canary and control arms, ms")
        figure = latency.by_version(frame, "e2e_p95", marks, here.window, here.colours, ",.0f")
        draw_to_traces(figure, "arms-latency", "95th percentile of latency of canary and control over time.")


@shared
def _evidence(
    _one: Rollout, _decisions: list[DecisionRecord], key: str, rollout_id: int, newest: int | None, colours: Palette
) -> None:
    """What the guards of a rollout judged by: certainty, boundaries, latency of both arms, and the classes."""
    guards = _one.spec.get("guards", [])
    counts = ledger.counts(rollout_id, newest)
    metric = next((g["metric"] for g in guards if g["kind"] == "latency"), "e2e")
    columns = st.columns(3)
    with columns[0].container(border=True):
        heading("Certainty", "tokens per step, canary − control")
        drops = [g["max_drop"] for g in guards if g["kind"] == "tokens_per_step"]
        differences = rollout.differences(_decisions, drops[0] if drops else 0.0)
        figure = charts.certainty(differences, _one.canary, colours)
        draw(figure, f"certainty-{key}", "Difference of tokens per step, canary less control, with its interval.")
    with columns[1].container(border=True):
        heading("Evidence against the canary", "share of what rolls back, by guard")
        figure = charts.boundaries(rollout.evidence(_decisions, guards), colours)
        draw(figure, f"boundaries-{key}", "Evidence of each guard over time, as a share of what rolls back.")
    with columns[2].container(border=True):
        heading("Latency of both arms", f"{guard_table.METRICS.get(metric, metric)} by quantile, all compared requests")
        figure = charts.quantile_curves(rollout.curves(counts, metric), _one.canary, _one.champion, colours)
        draw(figure, f"curves-{key}", "Latency of canary and control by quantile.")
    with st.container(border=True):
        heading("Classes", "canary and control, all compared requests since the start")
        rollout.class_table(counts, metric)


def _history() -> None:
    found = ledger.all_rollouts()
    if not found:
        st.caption("None yet.")
        return
    rows = [
        {
            "id": r.id,
            "version": f"v{r.canary}",
            "against": f"v{r.champion}",
            "state": r.state.value.lower().replace("_", " "),
            "by": r.actor,
            "began": r.created_at,
            "minutes": (r.updated_at - r.created_at).total_seconds() / 60,
            "because": r.status.get("reason", ""),
        }
        for r in found
    ]
    columns: Columns = {
        "id": st.column_config.NumberColumn("id", width=50),
        "version": "canary",
        "began": st.column_config.DatetimeColumn("began", format="MMM D, HH:mm:ss"),
        "minutes": st.column_config.NumberColumn("minutes", format="%.1f"),
        "because": st.column_config.TextColumn("because", width="large"),
    }
    colours = current().colours
    event = table(
        pd.DataFrame(rows),
        columns,
        "history",
        {"version": by_identity(colours)},
        on_select="rerun",
        selection_mode="single-row",
    )
    chosen = event.selection.rows[0] if event.selection.rows else 0
    if chosen < len(found):
        one = found[chosen]
        decisions = ledger.decisions(one.id)
        serving = ledger.serving()
        if one.state not in (RolloutState.DRAFT,) and (serving.rollout is None or serving.rollout.id != one.id):
            _evidence(one, decisions, "chosen", one.id, _newest(decisions), colours)
        decision_log.panel(one, decisions, colours)


context.live(head, still=verbs.is_asking())
verbs.buttons(ledger.serving(), current().part)
context.live(page, still=verbs.is_asking())
context.live(record, still=verbs.is_asking(), slowly=ledger.serving().plan is not None)
