"""Single requests: find one, see where its time went and where each of its tokens came from."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any
from uuid import UUID

import pandas as pd
import streamlit as st

from app.charts import trace as charts
from app.charts.theme import Palette
from app.components import context, tokens
from app.components.context import heading, plain
from app.components.drawing import draw
from app.components.tables import Columns, in_colour, table
from app.components.tokens import Origin
from app.queries import ledger, traces
from engine.contracts import Status
from engine.store import frames
from engine.store.models import TraceRow
from engine.store.repositories.overview import Slice
from engine.store.repositories.traces import Filter, Trace

current = context.bar()
STATUSES = ["All statuses", *(status.value for status in Status)]
DEEP = 100_000  # pages end here: what lies deeper is found by narrower filters
ORDERS = {"Newest first": "newest", "Slowest first": "slowest"}
HIDDEN: dict[str, Any] = {"label_visibility": "collapsed"}


def page() -> None:
    here = current()
    asked = st.query_params.get("trace")
    if asked:
        _one(asked, here.colours)
        return
    chosen, order = _filters()
    many, is_all = traces.matching(here.part, chosen)
    if not many:
        context.headline("**No request** matches.")
        st.info("Choose a longer window or fewer filters.", icon=":material/info:")
        return
    context.headline(f"**{'' if is_all else 'More than '}{many:,}** requests. Choose one to open it.")
    pages = -(-min(many, DEEP) // traces.PAGE)
    number = min(int(st.session_state.get("page") or 1), pages)
    frame = traces.listed(here.part, chosen, ORDERS[order], number)
    _table(frame, here.colours)
    with st.container(horizontal=True, vertical_alignment="center", key="pages"):
        if pages > 1:
            st.pagination(pages, key="page", bind="query-params")
        deep = f"; the last {many - DEEP:,} are reached by a shorter window or the other order" if many > DEEP else ""
        st.caption(f"{traces.PAGE} a page{deep}", width="stretch")
        st.link_button("Why did it change?", context.link("explain", here.part), icon=":material/account_tree:")
        _download(here.part, chosen, ORDERS[order], min(many, DEEP))


def _filters() -> tuple[Filter, str]:
    """What of the slice is listed, and in which order. All of it is in the URL."""
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="filters"):
        status = st.selectbox("Status", STATUSES, key="status", bind="query-params", width=142, **HIDDEN)
        order = st.selectbox("Order", ORDERS, key="order", bind="query-params", width=162, **HIDDEN)
        slow = st.number_input(
            "At least, ms", min_value=0, step=100, value=None, key="min_ms", bind="query-params", width=170,
            placeholder="At least, ms", **HIDDEN,
        )  # fmt: skip
        tenant = st.text_input("Tenant", key="tenant", bind="query-params", width=130, placeholder="Tenant", **HIDDEN)
        conversation = st.text_input(
            "Conversation", key="conversation", bind="query-params", width=170, placeholder="Conversation", **HIDDEN
        )
        st.text_input("Trace id", key="wanted", width=200, on_change=_go, placeholder="Trace id", **HIDDEN)
    chosen = Filter(
        status=None if status == STATUSES[0] else status,
        tenant=(tenant or "").strip() or None,
        conversation=(conversation or "").strip() or None,
        min_e2e_s=slow / 1e3 if slow else None,
    )
    return chosen, order


def _download(part: Slice, chosen: Filter, order: str, many: int) -> None:
    """The whole list, not only the page that is shown."""
    with st.popover("Export", icon=":material/download:"):
        form = st.segmented_control("Format", frames.FORMATS, default="csv", key="form", required=True) or "csv"
        st.download_button(
            f"Download {many:,} rows",
            lambda: frames.encode(traces.every(part, chosen, order, DEEP), str(form), context.parameters(part)),
            file_name=f"traces.{form}",
            key="download",
            on_click="ignore",
        )


def _table(frame: pd.DataFrame, colours: Palette) -> None:
    number = st.column_config.NumberColumn
    frame = frame.assign(version=[f"v{version}" for version in frame["policy_version"]])
    columns: Columns = {
        "started_at": st.column_config.DatetimeColumn("began", format="MMM D, HH:mm:ss.SSS"),
        "traffic_class": "class",
        "arm": "arm",
        "version": st.column_config.TextColumn("version", width=70),
        "status": "status",
        "e2e_ms": number("e2e, ms", format="%.0f"),
        "ttft_ms": number("TTFT, ms", format="%.0f"),
        "tpot_ms": number("TPOT, ms", format="%.1f"),
        "queue_ms": number("queue, ms", format="%.0f"),
        "prompt_tokens": number("prompt", help="tokens"),
        "output_tokens": number("output", help="tokens"),
        "drafted": number("drafted", help="tokens"),
        "accepted": number("accepted", help="tokens"),
        "acceptance_length": number("acceptance length", format="%.2f", help="1 + accepted / verify steps"),
        "retry": number("retry", width=60),
        "tenant": "tenant",
        "trace_id": "trace",
    }
    event = table(
        in_colour(frame[list(columns)], colours),
        columns,
        "list",
        on_select="rerun",
        selection_mode="single-row",
        height=min(38 + 35 * len(frame), 720),
    )
    if event.selection.rows:
        st.query_params["trace"] = frame.iloc[event.selection.rows[0]]["trace_id"]
        st.rerun()


def _one(asked: str, colours: Palette) -> None:
    try:
        found = traces.one(UUID(asked))
    except ValueError:
        _back()
        st.error(f"`{asked}` is not a trace id. It looks like 0b0e3a1c-5b1d-4f0e-9d4f-6f2b8f1c2d3e.")
        return
    if found is None:
        _back()
        st.warning("There is no such trace, or it is past its retention.")
        return
    row = found.row
    length = f", acceptance length {1 + row.accepted / row.steps:.2f}" if row.steps else ""
    with st.container(horizontal=True, vertical_alignment="center", key="headline"):
        _back()
        st.markdown(
            f"**{plain(row.traffic_class)}** request on **v{row.policy_version}** ({row.arm}), {row.status}: "
            f"{row.output_tokens} tokens in {row.e2e_s * 1e3:,.0f} ms{length}",
            width="stretch",
        )
    left, right = st.columns([3, 2])
    with left.container(border=True, height="stretch"):
        heading("Response", "hover a token to see its step")
        _response(found, colours)
    with right.container(border=True, height="stretch"):
        heading("Time", "from arrival, ms")
        draw(charts.waterfall(_parts(row), colours), "waterfall", "Where the time of this request went.")
        if found.payload is not None:
            heading("Verify steps", "tokens drafted, and how many of them were accepted")
            figure = charts.steps(found.payload.step_drafted, found.payload.step_accepted, colours)
            draw(figure, "steps", "Tokens drafted and accepted in each verify step.")
    with st.container(border=True):
        heading("Fields")
        _fields(row)


def _back() -> None:
    if st.button("All traces", icon=":material/arrow_back:", key="back", width="content"):
        del st.query_params["trace"]
        st.rerun()


def _response(found: Trace, colours: Palette) -> None:
    if found.row.error:
        st.error("This request failed:")
        st.code(found.row.error, language=None, wrap_lines=True)
    if found.payload is None:
        st.caption("The tokens of this request were not kept, or are past their retention.")
        return
    shades = _shades(colours)
    marks = tokens.marks(found.payload)
    counts: dict[Origin, int] = dict(Counter(mark.origin for mark in marks))
    st.html(tokens.legend(shades, counts) + tokens.html(marks, traces.pieces, shades))
    with st.expander(f"Prompt, {len(found.payload.prompt_ids)} tokens"):
        st.text("".join(traces.pieces(list(found.payload.prompt_ids))))


def _shades(colours: Palette) -> dict[Origin, str]:
    """Judgement colours, thin enough to read text on."""
    return {
        "prefill": "transparent",
        "plain": "transparent",
        "accepted": f"{colours.good}38",
        "recovered": f"{colours.warn}30",
        "bonus": f"{colours.quantiles[1]}38",
        "rejected": f"{colours.bad}30",
    }


def _parts(row: TraceRow) -> list[tuple[str, float, float]]:
    """Queue, prefill and decode end to end; below decode the drafting and verifying it is made of."""
    parts, at = [], 0.0
    queue, ttft = row.queue_s or 0.0, row.ttft_s
    if row.queue_s is not None:
        parts.append(("queue", 0.0, queue * 1e3))
        at = queue * 1e3
    if ttft is None:
        return parts
    parts.append(("prefill", at, (ttft - queue) * 1e3))
    decode, start = max(row.e2e_s - ttft, 0.0) * 1e3, ttft * 1e3
    parts.append(("decode", start, decode))
    draft, verify = min(row.draft_s * 1e3, decode), min(row.verify_s * 1e3, decode)
    parts.append(("draft, sum", start, draft))
    parts.append(("verify, sum", start + draft, min(verify, decode - draft)))
    other = min(row.other_s * 1e3, decode - draft - parts[-1][2])
    if other > 0:
        parts.append(("other, sum", start + draft + parts[-1][2], other))
    return parts


def _fields(row: TraceRow) -> None:
    taught = ledger.taught(row.trace_id)
    fields = {
        "trace": row.trace_id,
        "request": row.request_id,
        "began": f"{row.started_at:%Y-%m-%d %H:%M:%S.%f} UTC",
        "replica": row.replica_id,
        "tenant": row.tenant or "–",
        "assignment key": row.assignment_key,
        "finish reason": row.finish_reason or "–",
        "temperature": row.temperature,
        "retry": row.retry,
        "preemptions": row.preemptions,
        "taught": ", ".join(f"v{version}" for version in taught) or "no version",
    }
    for column, chunk in zip(st.columns(3), range(3), strict=True):
        items = list(fields.items())[chunk::3]
        # HTML with everything escaped: as Markdown, a client's own words could fetch images and disguise links.
        column.html(
            "<br>".join(f'<span style="opacity:.65">{name}</span> {escape(str(value))}' for name, value in items)
        )


def _go() -> None:
    if wanted := str(st.session_state["wanted"]).strip():
        st.query_params["trace"] = wanted


context.live(page)
