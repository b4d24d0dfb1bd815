"""Why did performance change? Two windows, one sentence, a waterfall, and what happened between them."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial

import pandas as pd
import streamlit as st

from app.charts import system
from app.components import context, sheets
from app.components.cards import EXPLAINED, cards
from app.components.cards import first as first_of
from app.components.context import FIXED, RANGES, heading, link, plain
from app.components.drawing import draw
from app.components.export import MIME
from app.components.sheets import number, sheet, words
from app.queries import explain, overview
from engine.diagnosis.explain import METRICS, Explanation, signed
from engine.store import frames
from engine.store.repositories.overview import Slice

FEW = 8
"""Cells that are shown: those that moved the metric most."""
LATEST = 12
"""Events that are shown."""
current = context.bar()
BACK = {"the window before": None, "1 hour": "1h", "6 hours": "6h", "1 day": "24h", "7 days": "7d"}


def page() -> None:
    here = current()
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="windows"):
        metric = st.segmented_control(  # by the names that links have: what a widget shows is what it puts into the URL
            "What changed", list(METRICS), default="p95", key="metric", bind="query-params", required=True,
            label_visibility="collapsed",
        ) or "p95"  # fmt: skip
        st.markdown("compared with", width="content")
        back = st.selectbox("Compared with", list(BACK), key="back", bind="query-params", width=180,
                            label_visibility="collapsed", format_func=_ago)  # fmt: skip
    # Without a version: a policy cannot be told from itself.
    second = _whole_minutes(replace(here.part, version=None), is_past=here.range == FIXED)
    first = _earlier(second, back)
    head = st.container(key="headline")
    # How far each metric moved is read from rollups and is there at once; why, takes a look at the requests.
    now, before, trend = overview.totals(second), overview.totals(first), overview.over_time(second)
    if len(now):
        st.html(cards(first_of(now), first_of(before), trend, here.colours, EXPLAINED))
    with head:
        found = explain.between(first, second, str(metric))
        st.markdown(plain(found.sentence))
    before_n, now_n = found.requests
    st.caption(f"{_window(first)} ({before_n:,} answered requests) against {_window(second)} ({now_n:,})")
    if found.total is None:
        st.info("Choose a longer window, fewer filters, or another comparison.", icon=":material/info:")
    else:
        left, right = st.columns([3, 2])
        with left.container(border=True, height="stretch"):
            unit = (
                f"percentage points of requests above the first window's {metric}"
                if _is_quantile(metric)
                else found.unit
            )
            heading("Where the change comes from", f"{unit}; grey where it may be nothing")
            lower = METRICS[str(metric)].better == "lower"
            figure = system.waterfall(found.parts, found.total, lower, found.unit, here.colours)
            draw(figure, "waterfall", found.sentence)
        with right.container(border=True, height="stretch"):
            heading("Which traffic", "share of requests in either window, and what it adds to the change")
            _cells(found, second)
    left, right = st.columns(2)
    with left.container(border=True, height="stretch"):
        heading("What happened between", "ledger and learner")
        _events(found)
    with right.container(border=True, height="stretch"):
        heading("The traces that show it", "slowest of the traffic that moved it most")
        _examples(found)
    with st.container(horizontal=True):
        for form in frames.FORMATS if found.total is not None else ("json",):
            st.download_button(
                {"json": "JSON", "csv": "CSV", "parquet": "Parquet"}[form], partial(_file, found, form),
                file_name=f"explanation.{form}", mime=MIME[form], on_click="ignore", icon=":material/download:",
            )  # fmt: skip
        st.code(_command(first, second, str(metric)), language="bash")


def _file(found: Explanation, form: str) -> bytes:
    """JSON has all of it; a table has the parts of the change, the whole last."""
    parts = [asdict(part) for part in (*found.parts, found.total) if part is not None]
    return frames.encode([] if form == "json" else parts, form, found.to_rows())


def _is_quantile(metric: str) -> bool:
    return METRICS[metric].quantile is not None


def _earlier(second: Slice, back: str) -> Slice:
    """The first window: as long as the second, so much earlier; never one that overlaps it."""
    length = second.until - second.since
    name = BACK[back]
    shift = max(RANGES[name], length) if name else length
    return replace(second, since=second.since - shift, until=second.until - shift)


def _whole_minutes(part: Slice, is_past: bool) -> Slice:
    """Its window by the minutes that rollups know, so that cards and sentence speak of the same requests.

    Of a window that was asked for (``is_past``) nothing is lost; one that ends now ends with the last whole minute.
    """
    since, until = (at.replace(second=0, microsecond=0) for at in (part.since, part.until))
    if (is_past and until < part.until) or until <= since:
        until += timedelta(minutes=1)
    return replace(part, since=since, until=until)


def _ago(name: str) -> str:
    return name if BACK[name] is None else f"{name} earlier"


def _window(part: Slice) -> str:
    end = "%H:%M" if part.until - part.since < timedelta(days=1) else "%b %d, %H:%M"
    return f"{part.since:%b %d, %H:%M} – {part.until:{end}}"


def _cells(found: Explanation, second: Slice) -> None:
    frame = pd.DataFrame(
        [
            {
                "class": cell.traffic_class,
                "prompt": cell.prompt_tokens,
                "before": 100 * cell.share_before,
                "after": 100 * cell.share_after,
                "adds": cell.effect,
                "traces": link("traces", replace(second, traffic_class=cell.traffic_class)),
            }
            for cell in found.cells[:FEW]
        ]
    )
    columns = {
        "class": words("class"),
        "prompt": words("prompt"),
        "before": number("before", "{:.0f} %"),
        "after": number("after", "{:.0f} %"),
        "adds": sheets.Column("adds", signed, is_number=True),
        "traces": sheets.link("traces", lambda _: "open"),
    }
    sheet(frame, columns, "Which traffic")
    if (more := len(found.cells) - FEW) > 0:
        st.caption(f"{more} more that moved it less are in the JSON below.")


def _events(found: Explanation) -> None:
    if not found.events:
        st.caption("Nothing: the ledger did not change and the learner made no attempt.")
        return
    shown = found.events[-LATEST:]
    frame = pd.DataFrame([{"at": f"{e.at:%b %d, %H:%M:%S}", "what": e.kind, "text": e.text} for e in reversed(shown)])
    sheet(
        frame, {"at": words("at"), "what": words("what"), "text": words("entry", is_wide=True)}, "What happened between"
    )
    if (more := len(found.events) - LATEST) > 0:
        st.caption(f"{more} earlier ones are in the JSON below.")


def _examples(found: Explanation) -> None:
    rows = [{"window": name, "trace": f"/traces?trace={one}"} for name, ids in found.examples.items() for one in ids]
    if not rows:
        st.caption("None: there is no answer that they could show.")
        return
    columns = {"window": words("window"), "trace": sheets.link("trace", lambda address: address.partition("=")[2])}
    sheet(pd.DataFrame(rows), columns, "The traces that show it")


def _command(first: Slice, second: Slice, metric: str) -> str:
    minutes = max(int((second.until - second.since).total_seconds() // 60), 1)
    text = f"slipstream explain --from {first.since:%Y-%m-%dT%H:%M:%S} --to {second.since:%Y-%m-%dT%H:%M:%S}"
    text += f" --window {minutes}m --metric {metric}"
    for flag, value in (("class", second.traffic_class), ("arm", second.arm)):
        text += f" --{flag} {shlex.quote(value)}" if value else ""
    return text


page()
