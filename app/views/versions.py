"""Every draft policy: what it is, which traffic made it, what it did."""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape

import pandas as pd
import streamlit as st

from app.components import adaptation, context
from app.components.context import heading, plain
from app.components.tables import SHARE, Columns, in_colour, in_utc, table, trend_column, trends
from app.queries import ledger, overview
from app.queries.database import settings
from engine.contracts import PolicyVersion, ProposerKind
from engine.store.repositories.policies import Lineage

current = context.bar()


def page() -> None:
    versions = ledger.versions()
    if not versions:
        st.info(
            "No version yet. The engine makes the first two when it starts: `slipstream up`.", icon=":material/info:"
        )
        return
    serving = ledger.serving()
    champion = serving.plan.champion if serving.plan is not None else None
    learned = sum(v.kind is ProposerKind.TRACE_MEMORY for v in versions)
    refused = sum(a.outcome == "refused" for a in ledger.attempts())
    context.headline(
        f"**v{champion}** is champion. {len(versions)} versions, {learned} of them learned from traffic"
        f"{f'; {refused} refused by the gate' if refused else ''}."
    )
    chosen = _table(versions, serving)
    left, right = st.columns([1, 1])
    with left.container(border=True, height="stretch"):
        heading(f"Lineage of v{chosen.version}", "which traffic made it")
        _detail(chosen, versions)
    with right.container(border=True, height="stretch"):
        heading(f"Gate of v{chosen.version}", "tokens per verify step on held-out requests")
        _gate(chosen.version)
    with st.container(border=True):
        heading(f"Cost of v{chosen.version}", "what learning it took, and what it has saved since")
        adaptation.account(ledger.adaptation_of(chosen.version), settings().learner.price_per_hour)
    with st.container(border=True):
        heading("Attempts", "of the learner, the refused ones too")
        _attempts()


def _table(versions: list[PolicyVersion], serving: ledger.Serving) -> PolicyVersion:
    part = current().part
    totals = overview.totals(part, ("policy_version",))
    frame = pd.DataFrame(
        [
            {
                "policy_version": v.version,
                "version": f"v{v.version}",
                "role": "retired" if v.retired_at else serving.role(v.version),
                "kind": v.kind.value.replace("_", " "),
                "K": v.num_speculative_tokens,
                "parent": f"v{v.parent_version}" if v.parent_version else "",
                "created": v.created_at,
            }
            for v in versions
        ]
    )
    frame["share"] = float("nan")
    measured = ["requests", "acceptance_length", "decode_tokens_s", "e2e_p50", "e2e_p95", "e2e_p99"]
    if totals.empty:
        frame[measured] = float("nan")
    else:
        frame = frame.merge(totals[["policy_version", *measured]], on="policy_version", how="left")
        frame["share"] = 100 * frame["requests"] / frame["requests"].sum()
    frame["trend"] = trends(overview.over_time(part, ("policy_version",)), frame["policy_version"])
    number = st.column_config.NumberColumn
    columns: Columns = {
        "policy_version": None,
        "share": SHARE,
        "created": st.column_config.DatetimeColumn("created", format="MMM D, HH:mm:ss"),
        "requests": number("requests", format="localized"),
        "acceptance_length": number("acceptance length", format="%.2f", help="1 + accepted / verify steps"),
        "trend": trend_column(frame["trend"]),
        "decode_tokens_s": number("tokens / s", format="%.0f", help="Of one request while it decodes"),
        "e2e_p50": number("p50, ms", format="%.0f"),
        "e2e_p95": number("p95, ms", format="%.0f"),
        "e2e_p99": number("p99, ms", format="%.0f"),
    }
    with st.container(border=True):
        heading("Versions", "measured in the chosen window; choose one to read about it")
        event = table(
            in_colour(frame, current().colours),
            columns,
            "all-versions",
            column_order=_ORDER,
            on_select="rerun",
            selection_mode="single-row",
        )
    asked = current().part.version
    first = next((place for place, v in enumerate(versions) if v.version == asked), 0)
    row = event.selection.rows[0] if event.selection.rows else first
    return versions[row if row < len(versions) else 0]


_ORDER = [
    *("version", "role", "kind", "K", "parent", "created", "share", "requests", "acceptance_length", "trend"),
    *("decode_tokens_s", "e2e_p50", "e2e_p95", "e2e_p99"),
]


def _detail(version: PolicyVersion, versions: list[PolicyVersion]) -> None:
    st.html(_chain(version, versions))
    found = ledger.lineage(version.version)
    if not found:
        st.caption("No traffic on record: it was built in, or registered by hand.")
    for part in found:
        _traffic(part)
    st.caption(f"sha256 {version.digest}")
    if version.mlflow_version is not None and (uri := settings().mlflow_tracking_uri):
        link = f"{uri}/#/models/slipstream-draft/versions/{version.mlflow_version}"
        st.link_button("Open in MLflow", link, icon=":material/open_in_new:")


def _chain(version: PolicyVersion, versions: list[PolicyVersion]) -> str:
    """The version and its ancestors, each in its colour (HTML)."""
    colours, known = current().colours, {v.version: v for v in versions}
    links, at = [], known.get(version.version)
    while at is not None:
        colour = colours.version(at.version)
        links.append(
            f'<span style="border:1px solid {colour};border-radius:6px;padding:2px 8px;white-space:nowrap">'
            f'<b style="color:{colour}">v{at.version}</b> '
            f'<span style="color:{colours.muted}">{escape(at.kind.value.replace("_", " "))}</span></span>'
        )
        at = known.get(at.parent_version) if at.parent_version is not None else None
    arrow = f'<span style="color:{colours.muted}">←</span>'
    return f'<div style="display:flex;flex-wrap:wrap;gap:8px;align-items:center">{arrow.join(links)}</div>'


def _traffic(part: Lineage) -> None:
    role = "Learned from" if part.role == "train" else "Judged on"
    window = f"{_time(part.window_from)} to {_time(part.window_to)}"
    classes = ", ".join(f"{count:,} {plain(name)}" for name, count in sorted(part.classes.items(), key=lambda c: -c[1]))
    st.markdown(f"{role} **{part.traces:,} traces**: {classes}  \n:gray[{window}]")
    tenants = {name or "no tenant": count for name, count in ledger.tenants_of(part).items()}
    if set(tenants) != {"no tenant"}:
        st.caption("Tenants: " + ", ".join(f"{count:,} {plain(name)}" for name, count in tenants.items()))
    with st.expander("Traces", key=f"traces-{part.role}"):
        frame = pd.DataFrame({"trace": [f"/traces?trace={trace_id}" for trace_id in ledger.traces_of(part)]})
        link = st.column_config.LinkColumn("trace", display_text="trace=(.*)")
        table(frame, {"trace": link}, f"lineage-{part.role}", height=240)


def _gate(version: int) -> None:
    report = ledger.gate_of(version)
    comparisons = (report or {}).get("classes") or {}
    overall = (report or {}).get("overall")
    if not comparisons and not overall:
        st.caption("No gate: it was built in, or registered by hand.")
        return
    rows = [{"class": name, **values} for name, values in comparisons.items()]
    if overall:
        rows.insert(0, {"class": "all", **overall})
    form = "{:.2f}".format
    frame = pd.DataFrame(
        [
            {
                "class": row["class"],
                "requests": row["n"],
                "parent": form(row["champion"]),
                "candidate": form(row["candidate"]),
                "difference": f"{row['delta']:+.2f}",
                "interval": f"{row['low']:+.2f} to {row['high']:+.2f}",
            }
            for row in rows
        ]
    )
    columns = {"parent": st.column_config.TextColumn("champion", help="The champion of that moment")}
    table(frame, columns, "gate")
    passed = (report or {}).get("passed")
    mark = ":green[**Passed**]" if passed else ":red[**Refused**]"
    st.markdown(f"{mark}: {plain('; '.join((report or {}).get('reasons', [])))}.")


def _attempts() -> None:
    found = ledger.attempts()
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
        "CPU, s": st.column_config.NumberColumn("CPU, s", format="%.2f"),
    }
    frame = in_utc(frame).style.map(_outcome, subset=["outcome"])
    table(frame, columns, "attempts")


def _outcome(outcome: str) -> str:
    colours = current().colours
    shade = {"registered": colours.good, "refused": colours.bad}.get(outcome, colours.muted)
    return f"color: {shade}; font-weight: 600"


def _time(at: datetime) -> str:
    return f"{at.astimezone(UTC):%b %d, %H:%M:%S}"


context.live(page)
