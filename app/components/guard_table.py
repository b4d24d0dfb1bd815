"""The guard table: each guard in its own unit, how far it is from its limit, and what it still needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Any

import pandas as pd
import streamlit as st

from app.charts.theme import Palette
from app.components.sheets import share, sheet, words
from engine.percent import percent
from engine.rollout import explain
from engine.rollout.guards import SpecError
from engine.rollout.specs import thaw
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
                "said": "; ".join(part for part in (guard["reason"], outlook) if part),
            }
        )
    return pd.DataFrame(rows)


def _interval(low: float, high: float, relative: bool) -> str:
    return f"{percent(low, sign='+')} to {percent(high, sign='+')}" if relative else f"{low:+.2f} to {high:+.2f}"


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
    columns = {
        "verdict": words("verdict", by_verdict(colours)),
        "guard": words("guard"),
        "segment": words("segment"),
        "n": words("n", note="Requests or keys of each arm: canary / control"),
        "canary": words("canary"),
        "control": words("control"),
        "interval": words("difference", note="Confidence sequence, valid at every look"),
        "near": share("to its limit", note="At 100 % the guard fails"),
        "said": words("because", note="An outlook takes the present estimate for the truth", is_wide=True),
    }
    if set(frame["segment"]) == {"all"}:
        del columns["segment"]
    sheet(frame, columns, "Guards")


def by_verdict(colours: Palette) -> Callable[[str], str]:
    """Verdicts in colour: only PASS and FAIL judge, the rest wait."""
    shades = {"PASS": colours.good, "FAIL": colours.bad, "ERROR": colours.warn, "STALE": colours.warn}
    return lambda verdict: shades.get(verdict, colours.muted)


def name_of(guard: str, specs: Sequence[Mapping[str, Any]] = ()) -> str:
    """A guard as a reader calls it: ``e2e_p95`` is the p95 of the end-to-end latency."""
    fuse = next((spec for spec in specs if spec["kind"] == "fuse_p95"), None)
    if guard == "fuse_p95" and fuse is not None:
        return f"p95 {METRICS[fuse['metric']]} ≤ {fuse['ratio']:g} ×"
    metric, _, quantile = guard.partition("_p")
    if metric in METRICS and quantile:
        return f"p{quantile} {METRICS[metric]}"
    return NAMES.get(guard, guard.replace("_", " "))
