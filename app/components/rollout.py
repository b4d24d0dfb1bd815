"""The parts of the rollouts page: slice, steps, and what the charts and the classes are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd
import streamlit as st

from app.charts.theme import Palette
from app.components.guard_table import name_of
from app.components.sheets import number, sheet, words
from app.components.tables import by_identity
from app.queries.ledger import Serving
from engine.contracts import CANARY, CHAMPION, CONTROL, RolloutState, ServingPlan
from engine.rollout import quantiles
from engine.store import histogram
from engine.store.repositories.rollouts import DecisionRecord, Rollout

PERCENT = "{:.0f} %"


def slice_now(serving: Serving, counts: Mapping[str, int], colours: Palette) -> None:
    """Arms with three weights: what the ledger asks for, what replicas have taken, what traffic shows."""
    plan = serving.plan
    assert plan is not None
    total = sum(counts.values())
    rows = [
        {
            "arm": name,
            "version": f"v{version}",
            "desired": _weight(plan, name),
            "acknowledged": _weight(serving.acknowledged, name) if serving.acknowledged is not None else None,
            "observed": counts.get(name, 0) / total * 100 if total else None,
        }
        for name, version in [(CHAMPION, plan.champion), *((arm.name, arm.policy_version) for arm in plan.arms)]
    ]
    columns = {
        "arm": words("arm"),
        "version": words("version", by_identity(colours)),
        "desired": number("desired", PERCENT, note="What the ledger asks for"),
        "acknowledged": number("acknowledged", PERCENT, note="What every live replica routes by"),
        "observed": number("observed", PERCENT, note="Share of the requests under this plan, last hour at most"),
    }
    sheet(pd.DataFrame(rows), columns, "Serving now")
    behind = [r.replica_id for r in serving.replicas if (r.observed_generation or 0) < plan.generation]
    if behind:
        st.warning(f"Generation {plan.generation} is not yet observed by {', '.join(behind)}.")
    elif not serving.replicas:
        st.caption("No replica is alive. The newest plan takes effect when one starts.")
    else:
        many = "replica routes" if len(serving.replicas) == 1 else "replicas route"
        st.caption(f"{len(serving.replicas)} {many} by generation {plan.generation}, {total:,} requests under it.")


def steps(rollout: Rollout, colours: Palette) -> str:
    """Where a rollout is on its way, as a line of stations (HTML)."""
    stages = len(rollout.status.get("stages", []))
    state = RolloutState(rollout.state)
    weights = [f"{weight * 100:g} %" for weight in rollout.spec.get("steps", [])]
    limited = any(rollout.spec.get(name) for name in ("traffic_classes", "tenants", "slices"))
    names = [*weights, "soak", "proved" if limited else "champion"]
    if rollout.spec.get("shadow"):  # serves nobody, and comes before the first weight
        weights, names, stages = ["shadow", *weights], ["shadow", *names], stages + bool(rollout.status.get("shadow"))
    won = {RolloutState.PROMOTED, RolloutState.WATCHING, RolloutState.DONE}
    at = len(names) if state in won else len(weights) + 1 if state is RolloutState.PROMOTING else stages - 1
    if state is RolloutState.SOAKING:
        at = len(weights)
    colour = colours.version(rollout.canary)
    parts = []
    for place, name in enumerate(names):
        if place:
            line = colour if place <= at else colours.grid
            parts.append(f'<span style="flex:1;height:2px;background:{line};margin:0 6px"></span>')
        passed, here = place < at, place == at
        dot = f"background:{colour if passed or here else 'transparent'};border:2px solid " + (
            colour if passed or here else colours.muted
        )
        ring = f"box-shadow:0 0 0 4px {colour}33;" if here else ""
        weight = 600 if here else 400
        parts.append(
            f'<span style="display:inline-flex;align-items:center;gap:6px;white-space:nowrap;font-weight:{weight}">'
            f'<span style="width:10px;height:10px;border-radius:50%;box-sizing:border-box;{dot};{ring}"></span>'
            f"{escape(name)}</span>"
        )
    return f'<div style="display:flex;align-items:center;font-size:0.88rem;padding:8px 4px 2px">{"".join(parts)}</div>'


def differences(decisions: list[DecisionRecord], max_drop: float) -> pd.DataFrame:
    """(at, difference, low, high, allowed) of tokens per step over all decisions that had an estimate."""
    rows = []
    for decision in decisions:
        for guard in decision.evidence.get("guards", []):
            if guard["guard"] == "tokens_per_step" and guard["segment"] == "all" and guard["canary"] is not None:
                control = guard["control"]
                rows.append(
                    (decision.decided_at, guard["canary"] - control, guard["low"], guard["high"], -max_drop * control)
                )
    return pd.DataFrame(rows, columns=["at", "difference", "low", "high", "allowed"])


def evidence(decisions: list[DecisionRecord], specs: Sequence[Mapping[str, Any]] = ()) -> pd.DataFrame:
    """(at, guard, near): each statistical guard's log E as a share of its limit, over all decisions."""
    rows = [
        (decision.decided_at, name_of(guard["guard"], specs), guard["log_e"] / guard["limit"])
        for decision in decisions
        for guard in decision.evidence.get("guards", [])
        if guard["log_e"] is not None and guard["limit"]
    ]
    return pd.DataFrame(rows, columns=["at", "guard", "near"])


def curves(counts: list[dict[str, Any]], metric: str) -> pd.DataFrame:
    """(arm, level, ms): the quantile curve of each arm, all classes together."""
    parts = []
    for segment in counts:
        indices, numbers = segment.get("latencies", {}).get(metric, ([], []))
        if segment["traffic_class"] is None and indices:
            levels, seconds = quantiles.curve(dict(zip(indices, numbers, strict=True)))
            parts.append(pd.DataFrame({"arm": segment["arm"], "level": levels, "ms": 1e3 * seconds}))
    return pd.concat(parts) if parts else pd.DataFrame(columns=["arm", "level", "ms"])


def class_rows(counts: list[dict[str, Any]], metric: str) -> pd.DataFrame:
    """One row a traffic class, both arms side by side; all classes together first."""
    found = {(s["arm"], s["traffic_class"]): s for s in counts}
    names = sorted({name for _, name in found}, key=lambda name: (name is not None, name or ""))
    rows = []
    for name in names:
        row: dict[str, Any] = {"class": name or "all"}
        for arm in (CANARY, CONTROL):
            one = found.get((arm, name), {})
            indices, numbers = one.get("latencies", {}).get(metric, ([], []))
            held = dict(zip(indices, numbers, strict=True))
            row |= {
                f"n_{arm}": one.get("requests", 0),
                f"tokens_{arm}": one["x"] / one["y"] if one.get("y") else None,
                f"p50_{arm}": 1e3 * (histogram.quantile(held, 0.5) or 0) or None,
                f"p95_{arm}": 1e3 * (histogram.quantile(held, 0.95) or 0) or None,
                f"errors_{arm}": one.get("error_keys", 0) + one.get("timeout_keys", 0),
            }
        if row[f"tokens_{CANARY}"] and row[f"tokens_{CONTROL}"]:
            row["change"] = 100 * (row[f"tokens_{CANARY}"] / row[f"tokens_{CONTROL}"] - 1)
        rows.append(row)
    order = ["n", "tokens", "p50", "p95", "errors"]
    columns = ["class", *(f"{what}_{arm}" for what in order for arm in (CANARY, CONTROL)), "change"]
    return pd.DataFrame(rows).reindex(columns=columns)


def class_table(counts: list[dict[str, Any]], metric: str) -> None:
    """Who gains and who loses, by class."""
    frame = class_rows(counts, metric)
    if frame.empty:
        st.caption("Neither arm has served a request yet.")
        return
    labels = {"n": ("n", "{:,.0f}"), "tokens": ("tokens / step", "{:.2f}"), "p50": ("p50, ms", "{:,.0f}")}
    labels |= {"p95": ("p95, ms", "{:,.0f}"), "errors": ("errors", "{:,.0f}")}
    columns = {"class": words("class")}
    for what, (label, form) in labels.items():
        for arm in (CANARY, CONTROL):
            columns[f"{what}_{arm}"] = number(f"{arm} {label}", form)
    columns["change"] = number("tokens / step, %", "{:+.1f}")
    sheet(frame, columns, "Classes of both arms")


def _weight(plan: ServingPlan, name: str) -> float:
    """Percent of the eligible keys."""
    if name == CHAMPION:
        return 100 * (1.0 - sum(arm.weight for arm in plan.arms))
    arm = plan.arm(name)
    return 100 * arm.weight if arm is not None else 0.0
