"""The list of versions with their trends, and what made one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from app.charts.theme import Palette, floats
from app.charts.versions import Node
from app.components.cards import card, row
from app.components.context import plain
from app.components.sheets import number, sheet, words
from app.components.tables import NUMBER, SHARE, Columns, by_identity, sparkline, table, trends
from app.queries import versions
from app.queries.database import settings
from app.queries.ledger import Serving
from app.queries.versions import Family
from engine.contracts import PolicyVersion, ProposerKind, RolloutState
from engine.percent import percent
from engine.store.repositories.learning import Attempt
from engine.store.repositories.policies import Lineage

ORDER = [
    *("version", "role", "kind", "parent", "share", "share_trend", "requests", "acceptance_length", "trend"),
    *("e2e_p50", "p50_trend", "e2e_p95", "p95_trend", "decode_tokens_s", "K", "created"),
]
BUILT_IN = (ProposerKind.NONE.value, ProposerKind.NGRAM.value)
TALL = 10
"""Rows from which the table scrolls."""
ENDED = {
    RolloutState.ROLLED_BACK: ("rolled back", False),
    RolloutState.ROLLING_BACK: ("rolling back", False),
    RolloutState.INCONCLUSIVE: ("inconclusive", None),
    RolloutState.CANCELLED: ("cancelled", None),
}


def standing(
    serving: Serving, kinds: Mapping[str, int], outcomes: Mapping[str, int], changed: str, colours: Palette
) -> str:
    """Cards as HTML: champion, what is tried beside it, how many versions there are, what the gate let through, and
    when the ledger changed last (``changed``: "3 h ago", empty where it never did)."""
    plan, active = serving.plan, serving.rollout
    canary = plan.canary if plan is not None else None
    learned = sum(many for kind, many in kinds.items() if kind not in BUILT_IN)
    registered, refused = (outcomes.get(outcome, 0) for outcome in ("registered", "refused"))
    tried = f"v{canary.policy_version}" if canary is not None else f"v{active.canary}" if active is not None else "–"
    state = active.state.value.lower().replace("_", " ") if active is not None else "no rollout is active"
    made = [
        card("Champion", f"v{plan.champion}" if plan is not None else "–", "serves now", colours.good),
        card("Candidate", tried, f"takes {canary.weight * 100:g} %" if canary is not None else state, colours.muted),
        card("Before it", f"v{serving.previous}" if serving.previous is not None else "–", "", colours.muted),
        card("Versions", f"{sum(kinds.values()):,}", f"{learned:,} learned from traffic", colours.muted),
        card("Gate", f"{registered:,} passed", f"{refused:,} refused", colours.muted),
        card("Last change", changed or "–", f"by {plan.actor}" if plan is not None else "", colours.muted),
    ]
    return row(made, is_low=True)


def rows(
    found: Sequence[PolicyVersion],
    measured: pd.DataFrame,
    moved: pd.DataFrame,
    requests: int,
    roles: Mapping[int, str],
) -> pd.DataFrame:
    """One row a version, in the given order; what has not served has no numbers and no trend.

    ``moved``: at, policy_version, requests, acceptance_length, e2e_p50, e2e_p95; ``requests``: of all versions.
    """
    frame = pd.DataFrame(
        [
            {
                "policy_version": v.version,
                "version": f"v{v.version}",
                "role": "retired" if v.retired_at else roles.get(v.version, ""),
                "kind": v.kind.value.replace("_", " "),
                "K": v.num_speculative_tokens,
                "parent": f"v{v.parent_version}" if v.parent_version else "",
                "created": v.created_at,
            }
            for v in found
        ]
    )
    place = {version: row for row, version in enumerate(measured["policy_version"].tolist())} if len(measured) else {}
    at = np.array([place.get(v.version, -1) for v in found])
    for name in ("requests", "acceptance_length", "decode_tokens_s", "e2e_p50", "e2e_p95"):
        frame[name] = np.append(floats(measured, name), np.nan)[at]  # the last one for those that have not served
    frame["share"] = 100 * frame["requests"] / requests if requests else float("nan")
    if len(moved):
        _, bins = np.unique(moved["at"].to_numpy(), return_inverse=True)
        served = floats(moved, "requests")
        whole = np.bincount(bins, weights=np.nan_to_num(served))[bins]
        moved = moved.assign(share=100 * served / np.where(whole > 0, whole, np.nan))
    for name, column in _TRENDS.items():
        frame[name] = trends(moved, frame["policy_version"], column)
    return frame


_TRENDS = {"trend": "acceptance_length", "share_trend": "share", "p50_trend": "e2e_p50", "p95_trend": "e2e_p95"}


def listing(frame: pd.DataFrame, colours: Palette, key: str, choose: Any) -> None:
    """The table; ``choose`` runs when a row is chosen."""
    text = st.column_config.TextColumn
    columns: Columns = {
        "policy_version": None,
        "version": text("version", width=64, pinned=True),
        "role": text("role", width=76),
        "kind": text("kind", width=104),
        "parent": text("parent", width=60),
        "share": SHARE,
        "share_trend": sparkline("share, trend", frame["share_trend"], 0.0),
        "requests": NUMBER("requests", format="localized", width=76),
        "acceptance_length": NUMBER(
            "length", format="%.2f", help="Acceptance length: 1 + accepted / verify steps", width=64
        ),
        "trend": sparkline("length, trend", frame["trend"], 1.0),
        "e2e_p50": NUMBER("p50, ms", format="%.0f", width=72),
        "p50_trend": sparkline("p50, trend", frame["p50_trend"], 0.0),
        "e2e_p95": NUMBER("p95, ms", format="%.0f", width=72),
        "p95_trend": sparkline("p95, trend", frame["p95_trend"], 0.0),
        "decode_tokens_s": NUMBER("tokens / s", format="%.0f", help="Of one request while it decodes", width=76),
        "K": NUMBER("K", width=40),
        "created": st.column_config.DatetimeColumn("created", format="MMM D, HH:mm"),
    }
    height: Any = "content" if len(frame) <= TALL else 38 + 35 * TALL
    table(
        frame, columns, key, {"version": by_identity(colours)}, column_order=ORDER, on_select=choose,
        selection_mode="single-row", height=height,
    )  # fmt: skip


def nodes(family: Family, serving: Serving) -> list[Node]:
    """The graph's nodes, each with what became of it: what serves now, else how its newest rollout ended."""
    made = []
    for kin in family.kin:
        fate, role = family.fates[kin.version], serving.role(kin.version)
        word, is_good = role, None
        if kin.is_retired:
            word, is_good = "retired", False
        elif role in ("", "previous") and fate.rollout in ENDED:
            word, is_good = ENDED[fate.rollout]
        elif role in ("", "previous") and fate.was_champion:
            word, is_good = "promoted" if kin.parent is not None else "was champion", True
        elif role == "champion":
            is_good = True
        made.append(Node(kin.version, kin.parent, kin.distance, word, is_good, kin.is_retired, kin.more))
    return made


def taught(family: Family) -> dict[tuple[int, int], tuple[int, int]]:
    """(teacher, learner) → traces of the learner's training traffic that it served, of how many looked at."""
    return {
        (teacher, learner): (traces, sum(teachers.values()))
        for learner, teachers in family.taught_by.items()
        for teacher, traces in teachers.items()
    }


def training(version: PolicyVersion, family: Family) -> None:
    """Which traffic made it: counts, window, tenants, the versions that served it, and the traces themselves."""
    found = versions.lineage(version.version)
    if not found:
        st.caption("No traffic on record: it was built in, or registered by hand.")
    for part in found:
        _traffic(part, family.taught_by.get(version.version, {}) if part.role == "train" else {})
    st.caption(f"sha256 {version.digest}")
    if version.mlflow_version is not None and (uri := settings().mlflow_tracking_uri):
        link = f"{uri}/#/models/slipstream-draft/versions/{version.mlflow_version}"
        st.link_button("Open in MLflow", link, icon=":material/open_in_new:")


def _traffic(part: Lineage, teachers: Mapping[int, int]) -> None:
    role = "Learned from" if part.role == "train" else "Judged on"
    window = f"{_time(part.window_from)} to {_time(part.window_to)}"
    classes = ", ".join(f"{count:,} {plain(name)}" for name, count in sorted(part.classes.items(), key=lambda c: -c[1]))
    st.markdown(f"{role} **{part.traces:,} traces**: {classes}  \n:gray[{window}]")
    said = []
    names = {name or "no tenant": count for name, count in versions.tenants_of(part).items()}
    if set(names) != {"no tenant"}:
        said.append("Tenants: " + ", ".join(f"{count:,} {plain(name)}" for name, count in names.items()))
    if total := sum(teachers.values()):
        shares = ", ".join(f"v{teacher} {percent(count / total)}" for teacher, count in teachers.items())
        looked_at = f", by {total:,} of them" if total < part.traces else ""
        said.append(f"Served by {shares}{looked_at}")
    if said:
        st.caption(". ".join(said) + ".")
    with st.expander("Traces", key=f"traces-{part.role}"):
        frame = pd.DataFrame({"trace": [f"/traces?trace={trace_id}" for trace_id in versions.traces_of(part)]})
        link = st.column_config.LinkColumn("trace", display_text="trace=(.*)")
        table(frame, {"trace": link}, f"lineage-{part.role}", height=240)


def gate(version: int) -> None:
    """What the gate compared, by class."""
    report = versions.gate_of(version)
    comparisons = (report or {}).get("classes") or {}
    overall = (report or {}).get("overall")
    if not comparisons and not overall:
        st.caption("No gate: it was built in, or registered by hand.")
        return
    found = [{"class": name, **values} for name, values in comparisons.items()]
    if overall:
        found.insert(0, {"class": "all", **overall})
    columns = {
        "class": words("class"),
        "n": number("requests", "{:,.0f}"),
        "champion": number("champion", "{:.2f}", note="The champion of that moment"),
        "candidate": number("candidate", "{:.2f}"),
        "delta": number("difference", "{:+.2f}"),
        "interval": words("interval"),
    }
    frame = pd.DataFrame([row | {"interval": f"{row['low']:+.2f} to {row['high']:+.2f}"} for row in found])
    sheet(frame, columns, f"Gate of v{version}")
    passed = (report or {}).get("passed")
    mark = ":green[**Passed**]" if passed else ":red[**Refused**]"
    st.markdown(f"{mark}: {plain('; '.join((report or {}).get('reasons', [])))}.")


def attempts(found: Sequence[Attempt], colours: Palette) -> None:
    """Every attempt of the learner, newest first."""
    if not found:
        needed = settings().learner.min_requests
        st.caption(f"None yet. The learner begins after {needed} requests whose tokens it may learn from.")
        return
    frame = pd.DataFrame(
        [
            {
                "at": a.finished_at,
                "outcome": a.outcome,
                "version": f"v{a.version}" if a.version is not None else "",
                "parent": f"v{a.parent_version}" if a.parent_version is not None else "",
                "taught by": a.train_traces,
                "judged on": a.gate_traces,
                "CPU, s": a.cpu_s,
                "because": a.reason,
            }
            for a in found
        ]
    )
    columns = {
        "at": st.column_config.DatetimeColumn("at", format="MMM D, HH:mm:ss"),
        "outcome": "outcome",
        "CPU, s": st.column_config.NumberColumn("CPU, s", format="%.2f"),
    }
    shades = {"registered": colours.good, "refused": colours.bad}
    table(frame, columns, "attempts", {"outcome": lambda outcome: shades.get(outcome, colours.muted)})


def _time(at: datetime) -> str:
    return f"{at.astimezone(UTC):%b %d, %H:%M:%S}"
