"""Whether traffic and acceptance have drifted, and what was done about it."""

from __future__ import annotations

from datetime import timedelta

import pandas as pd
import streamlit as st

from app.charts import latency, speculation
from app.components import context
from app.components.alarms import alarms, named
from app.components.context import Context, ago, heading, link, plain
from app.components.drawing import draw_to_traces
from app.components.export import export
from app.components.shared import shared
from app.components.tables import Columns, table
from app.queries import ledger, overview
from engine.store.repositories.overview import Slice

current = context.bar()
NEAR = timedelta(hours=1)


def head() -> None:
    here = current()
    found = overview.rows("drift.findings", here.part)
    context.renew("drift", ledger.serving().generation, _is_empty(here.part))
    if _is_empty(here.part):
        context.headline("**No traffic** in this window, so nothing can drift.")
        st.info("Choose a longer window, or start the system: `slipstream up`.", icon=":material/info:")
        return
    still = found[found["ended_at"].isna()] if len(found) else found
    context.headline(_verdict(found, still))
    _alarms(here, _newest(found))


def page() -> None:
    here = current()
    if _is_empty(here.part):
        return
    _charts(here.charted(), ledger.serving().generation)
    export("drift", here.part)


def _is_empty(part: Slice) -> bool:
    return overview.totals(part, ("traffic_class",), ()).empty and overview.rows("drift.findings", part).empty


@shared
def _alarms(here: Context, newest: str) -> None:
    """``newest``: how long ago the newest finding was made."""
    found = overview.rows("drift.findings", here.part)
    by_class = overview.totals(here.part, ("traffic_class",), ())
    trends = overview.over_time(here.charted().part, ("traffic_class",), ())
    st.html(alarms(found, by_class, trends, newest, here.colours))
    with st.container(border=True):
        heading("Findings", "the last hour against the day before it; acceptance length against what was usual")
        _findings(found)


@shared
def _charts(here: Context, generation: int | None) -> None:
    part, colours, window = here.part, here.colours, here.window
    classes = overview.over_time(part, ("traffic_class",), ())
    marks = ledger.marks(part, generation)
    left, right = st.columns(2)
    with left.container(border=True):
        heading("Mix of traffic", "% of requests by class · drag to open the traces")
        figure = speculation.share_by_class(classes, marks, window, colours)
        draw_to_traces(figure, "mix", "Share of the requests over time by traffic class.")
    with right.container(border=True):
        heading("Acceptance length", "by class: what a change of mix cannot move")
        figure = speculation.by_class(classes, "acceptance_length", marks, window, colours)
        draw_to_traces(figure, "acceptance", "Acceptance length over time, a line a traffic class.")
    left, right = st.columns(2)
    for column, name, title in ((left, "prompt_tokens", "Prompt length"), (right, "output_tokens", "Output length")):
        with column.container(border=True):
            heading(title, "tokens a request, mean, by class")
            frame = classes.assign(mean=classes[name] / classes["requests"]) if len(classes) else classes
            figure = speculation.by_class(frame, "mean", marks, window, colours, ",.0f")
            draw_to_traces(figure, name, f"{title} over time, a line a traffic class.")
    with st.container(border=True):
        heading("Versions", "acceptance length over time: a slide at a constant version")
        versions = overview.over_time(overview.leading(part), ("policy_version",), ())
        figure = latency.by_version(versions, "acceptance_length", marks, window, colours)
        draw_to_traces(figure, "versions", "Acceptance length over time, a line a version.")


def _verdict(found: pd.DataFrame, still: pd.DataFrame) -> str:
    if len(still):
        first = still.iloc[0]
        more = f", and {len(still) - 1} more" if len(still) > 1 else ""
        return f":red[**{named(first['kind']).capitalize()}**]: {plain(first['detail'])}{more}."
    ended = f" {len(found)} findings of this window have ended." if len(found) else ""
    return f"**Nothing drifts** at this moment.{ended}"


def _newest(found: pd.DataFrame) -> str:
    """How long ago the newest finding was made; empty where there is none."""
    return ago(found["found_at"].max()) if len(found) else ""


def _findings(found: pd.DataFrame) -> None:
    if found.empty:
        st.caption(
            "None in this window. Housekeeping looks every two minutes. A class needs 100 requests in the last hour "
            "and in the day before it, the change-point detector 5,000 at one version."
        )
        return
    frame = found.assign(
        kind=[named(kind) for kind in found["kind"]],
        state=["open" if pd.isna(at) else "ended" for at in found["ended_at"]],
        version=[f"v{int(version)}" if pd.notna(version) else "all" for version in found["policy_version"]],
        certainty=[_times(row) for row in found.to_dict("records")],
        before=[_traces(row, "reference_since", "reference_until") for row in found.to_dict("records")],
        after=[_traces(row, "since", "until") for row in found.to_dict("records")],
        why=[_explain(row) for row in found.to_dict("records")],
    )
    number, text = st.column_config.NumberColumn, st.column_config.TextColumn
    to = st.column_config.LinkColumn
    columns: Columns = {
        "state": text("state", width=60),
        "kind": "what",
        "detail": text("finding", width="large"),
        "traffic_class": text("class", help="empty: all of them"),
        "version": text("version", width=70),
        "found_at": st.column_config.DatetimeColumn("found", format="MMM D, HH:mm"),
        "effect": number("size", format="%+.3f"),
        "certainty": number("of its threshold", format="%.1f ×", help="the statistic over the value that alarms"),
        "requests": number("requests", format="localized"),
        "learner": text("the learner since", help="within six hours"),
        "before": to("before", display_text="traces"),
        "after": to("after", display_text="traces"),
        "why": to("why", display_text="explain"),
    }
    table(frame[list(columns)], columns, "findings")


def _times(row: dict[str, object]) -> float:
    """How far a statistic is beyond its threshold; a dead draft alarms from below."""
    statistic, threshold = float(str(row["statistic"])), float(str(row["threshold"]))
    if row["kind"] == "silent_death":
        return float("nan")
    return statistic / threshold if threshold else float("nan")


def _part(row: dict[str, object], since: str, until: str) -> Slice:
    # What was there before a draft died was, most often, the version before.
    version = None if row["kind"] == "silent_death" and since != "since" else row["policy_version"]
    return Slice(
        pd.Timestamp(str(row[since])).to_pydatetime(),
        pd.Timestamp(str(row[until])).to_pydatetime(),
        str(row["traffic_class"]) if isinstance(row["traffic_class"], str) else None,
        version=int(float(str(version))) if pd.notna(version) else None,
    )


def _traces(row: dict[str, object], since: str, until: str) -> str:
    part = _part(row, since, until)
    if part.since >= part.until:
        return ""
    return link("traces", part)


def _explain(row: dict[str, object]) -> str:
    """The window of the finding against the one of its length before."""
    part = _part(row, "since", "until")
    return link(
        "explain", Slice(part.since, max(part.until, part.since + NEAR), part.traffic_class), metric="acceptance"
    )


context.live(head)
context.live(page, slowly=True)
