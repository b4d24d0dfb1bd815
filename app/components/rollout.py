"""The parts of the rollouts page: slice, steps, guard table and decision log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import repeat
from typing import Any

import pandas as pd
import streamlit as st

from app.charts.theme import Palette
from app.components.tables import by_identity, table
from app.queries.ledger import Serving
from engine.contracts import CANARY, CHAMPION, CONTROL, RolloutState, ServingPlan
from engine.rollout import explain, quantiles
from engine.rollout.guards import SpecError
from engine.rollout.specs import thaw
from engine.store import histogram
from engine.store.repositories.rollouts import DecisionRecord, Rollout

NAMES = {
    "tokens_per_step": "tokens / step",
    "errors": "errors",
    "fuse_mismatch": "outputs",
    "fuse_restarts": "restarts",
    "fuse_p95": "p95 fuse",
    "fuse_cost": "cost fuse",
    "srm": "even split",
}
PERCENT = "%.0f %%"


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
    number = st.column_config.NumberColumn
    columns = {
        "desired": number("desired", format=PERCENT, help="What the ledger asks for"),
        "acknowledged": number("acknowledged", format=PERCENT, help="What every live replica routes by"),
        "observed": number("observed", format=PERCENT, help="Share of the requests under this plan, last hour at most"),
    }
    table(pd.DataFrame(rows), columns, "arms", {"version": by_identity(colours)})
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


def guard_rows(
    guards: list[dict[str, Any]], specs: Sequence[Mapping[str, Any]] = (), outlooks: Sequence[str] = ()
) -> pd.DataFrame:
    """The guard table as text: each guard in its own unit, with its interval and how near it is to its limit.

    ``specs``: the guards as the rollout was started with; the fuse says which latency it judges only there.
    ``outlooks``: what each of ``guards`` still needs.
    """
    rows = []
    for guard, outlook in zip(guards, outlooks or repeat(""), strict=False):
        relative = guard["guard"].partition("_p")[0] in METRICS  # a latency: its interval is a relative change
        form = _milliseconds if relative else _FORMS.get(guard["guard"], "{:.3g}".format)
        low, high = guard["low"], guard["high"]
        evidence, limit = guard["log_e"], guard["limit"]
        if guard["guard"] in ("fuse_p95", "fuse_cost") and guard["canary"] and guard["control"]:
            evidence = guard["canary"] / guard["control"]
        near = 100 * min(max(evidence / limit, 0.0), 1.0) if evidence is not None and limit else None
        rows.append(
            {
                "verdict": guard["verdict"],
                "guard": name_of(guard["guard"], specs),
                "segment": guard["segment"],
                "n": f"{guard['n_canary']:,} / {guard['n_control']:,}",
                "canary": form(guard["canary"]) if guard["canary"] is not None else "",
                "control": form(guard["control"]) if guard["control"] is not None else "",
                "interval": _interval(low, high, relative) if low is not None and high is not None else "",
                "near": near,
                "outlook": outlook,
                "because": guard["reason"],
            }
        )
    return pd.DataFrame(rows)


def _interval(low: float, high: float, relative: bool) -> str:
    return f"{low:+.0%} to {high:+.0%}" if relative else f"{low:+.2f} to {high:+.2f}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


_FORMS: dict[str, Callable[[float], str]] = {
    "tokens_per_step": "{:.2f}".format,
    "errors": "{:.0f}".format,
    "fuse_p95": _milliseconds,
    "fuse_cost": _milliseconds,
}
METRICS = {"e2e": "e2e", "ttft": "TTFT", "tpot": "TPOT", "cost": "cost of a token"}


def outlooks(decision: DecisionRecord, rollout: Rollout, counts: list[dict[str, Any]]) -> list[str]:
    """What each guard of a decision still needs at the present traffic, as `slipstream rollout explain` says it."""
    tree = decision.evidence | {"inputs": {"segments": counts}}
    try:
        spec = thaw(rollout.spec)
    except SpecError:  # of another version of the code: the controller ends it, and says why
        return []
    rate = explain.per_second(tree, explain.began(decision.status_before, decision.decided_at), decision.decided_at)
    per_key = explain.per_key(tree)
    return [explain.needed(spec, guard, rate, per_key) for guard in explain.results(tree)]


def guard_table(decision: DecisionRecord, rollout: Rollout, counts: list[dict[str, Any]], colours: Palette) -> None:
    """What each guard saw, how far it is from its limit, and what it still needs."""
    said = outlooks(decision, rollout, counts)
    frame = guard_rows(decision.evidence.get("guards", []), rollout.spec.get("guards", []), said)
    if frame.empty:
        st.caption("No guard has been evaluated yet: the canary has not served.")
        return
    if set(frame["segment"]) == {"all"}:
        frame = frame.drop(columns="segment")
    text = st.column_config.TextColumn
    columns = {
        "verdict": text("verdict", width=108),
        "n": text("n", help="Requests or keys of each arm: canary / control"),
        "interval": text("difference", help="Confidence sequence, valid at every look", width=120),
        "near": st.column_config.ProgressColumn(
            "to its limit", format=PERCENT, min_value=0, max_value=100, help="At 100 % the guard fails", width=110
        ),
        "outlook": text("outlook", width="medium", help="Were the present estimate the truth, at the present traffic"),
        "because": text("because", width="large"),
    }
    table(frame, columns, "guards", {"verdict": by_verdict(colours)})


def by_verdict(colours: Palette) -> Callable[[str], str]:
    """Verdicts in colour: only PASS and FAIL judge, the rest wait."""
    shades = {"PASS": colours.good, "FAIL": colours.bad, "ERROR": colours.warn, "STALE": colours.warn}
    return lambda verdict: shades.get(verdict, colours.muted)


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


def class_table(counts: list[dict[str, Any]], metric: str, key: str) -> None:
    """Who gains and who loses, by class."""
    frame = class_rows(counts, metric)
    if frame.empty:
        st.caption("Neither arm has served a request yet.")
        return
    number = st.column_config.NumberColumn
    labels = {"n": ("n", "localized"), "tokens": ("tokens / step", "%.2f"), "p50": ("p50, ms", "%.0f")}
    labels |= {"p95": ("p95, ms", "%.0f"), "errors": ("errors", "localized")}
    columns: dict[str, Any] = {"change": number("tokens / step, %", format="%+.1f")}
    for what, (label, form) in labels.items():
        for arm in (CANARY, CONTROL):
            columns[f"{what}_{arm}"] = number(f"{arm} {label}", format=form)
    table(frame, columns, key)


def name_of(guard: str, specs: Sequence[Mapping[str, Any]] = ()) -> str:
    """A guard as a reader calls it: ``e2e_p95`` is the p95 of the end-to-end latency."""
    fuse = next((spec for spec in specs if spec["kind"] == "fuse_p95"), None)
    if guard == "fuse_p95" and fuse is not None:
        return f"p95 {METRICS[fuse['metric']]} ≤ {fuse['ratio']:g} ×"
    metric, _, quantile = guard.partition("_p")
    if metric in METRICS and quantile:
        return f"p{quantile} {METRICS[metric]}"
    return NAMES.get(guard, guard.replace("_", " "))


def log(decisions: list[DecisionRecord], colours: Palette) -> None:
    """Every turn and every minute's verdict, newest first."""
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


def _weight(plan: ServingPlan, name: str) -> float:
    """Percent of the eligible keys."""
    if name == CHAMPION:
        return 100 * (1.0 - sum(arm.weight for arm in plan.arms))
    arm = plan.arm(name)
    return 100 * arm.weight if arm is not None else 0.0
