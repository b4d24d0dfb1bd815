"""Single requests: find one, see where its time went and where each of its tokens came from."""

from __future__ import annotations

from collections import Counter
from uuid import UUID

import streamlit as st

from app.charts import trace as charts
from app.charts.theme import CONFIG, Palette
from app.components import context, tokens
from app.components.tables import Columns
from app.components.tokens import Origin
from app.queries import ledger, traces
from engine.contracts import Status
from engine.store.models import TraceRow
from engine.store.repositories.traces import Trace

current = context.bar()
ORDERS = ["newest", "slowest", "most drafted"]


def page() -> None:
    here = current()
    asked = st.query_params.get("trace")
    if asked:
        _one(asked, here.colours)
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        statuses = [status.value for status in Status]
        chosen = st.selectbox("Status", ["all", *statuses], key="status", bind="query-params", width=140)
        order = st.selectbox("Order", ORDERS, key="order", bind="query-params", width=160)
        st.text_input("Trace id", key="wanted", width=340, on_change=_go, placeholder="Paste one to open it")
    frame = traces.listed(here.part, None if chosen == "all" else chosen, order)
    context.age()
    if frame.empty:
        st.info("No request matches. Choose a longer window or fewer filters.", icon=":material/info:")
        return
    more = f" The first {traces.LIMIT:,} are shown." if len(frame) == traces.LIMIT else ""
    st.caption(f"{len(frame):,} requests. Choose one to open it.{more}")
    number = st.column_config.NumberColumn
    columns: Columns = {
        "started_at": st.column_config.DatetimeColumn("began", format="MMM D, HH:mm:ss.SSS"),
        "traffic_class": "class",
        "arm": "arm",
        "policy_version": number("version", format="v%d"),
        "status": "status",
        "e2e_ms": number("e2e, ms", format="%.0f"),
        "ttft_ms": number("TTFT, ms", format="%.0f"),
        "tpot_ms": number("TPOT, ms", format="%.1f"),
        "prompt_tokens": number("prompt", help="tokens"),
        "output_tokens": number("output", help="tokens"),
        "drafted": "drafted",
        "accepted": "accepted",
        "acceptance_length": number("acceptance length", format="%.2f"),
        "retry": "retry",
        "tenant": "tenant",
        "error": "error",
        "trace_id": "trace",
    }
    event = st.dataframe(
        frame[list(columns)],
        column_config=columns,
        hide_index=True,
        key="list",
        on_select="rerun",
        selection_mode="single-row",
        height=620,
    )
    if event.selection.rows:
        st.query_params["trace"] = frame.iloc[event.selection.rows[0]]["trace_id"]
        st.rerun()


def _one(asked: str, colours: Palette) -> None:
    if st.button("All traces", icon=":material/arrow_back:", key="back"):
        del st.query_params["trace"]
        st.rerun()
    try:
        found = traces.one(UUID(asked))
    except ValueError:
        st.error(f"`{asked}` is not a trace id. It looks like 0b0e3a1c-5b1d-4f0e-9d4f-6f2b8f1c2d3e.")
        return
    if found is None:
        st.warning("There is no such trace, or it is past its retention.")
        return
    row = found.row
    length = f"{1 + row.accepted / row.steps:.2f}" if row.steps else "–"
    st.markdown(
        f"**{row.traffic_class}** request served by **v{row.policy_version}** ({row.arm}, "
        f"generation {row.generation}): "
        f"{row.status}, {row.output_tokens} tokens in {row.e2e_s * 1e3:,.0f} ms, {row.drafted} drafted, "
        f"{row.accepted} accepted, acceptance length {length}."
    )
    left, right = st.columns([3, 2])
    with left.container(border=True, height="stretch"):
        st.markdown("**Response** hover a token to see its step")
        _response(found, colours)
    with right.container(border=True, height="stretch"):
        st.markdown("**Time** from arrival, ms")
        st.plotly_chart(charts.waterfall(_parts(row), colours), key="waterfall", config=CONFIG, theme=None)
        if found.payload is not None:
            st.markdown("**Verify steps** tokens drafted and accepted")
            figure = charts.steps(found.payload.step_drafted, found.payload.step_accepted, colours)
            st.plotly_chart(figure, key="steps", config=CONFIG, theme=None)
    with st.container(border=True):
        st.markdown("**Fields**")
        _fields(row)


def _response(found: Trace, colours: Palette) -> None:
    if found.row.error:
        st.error(found.row.error)
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
    """Queue, prefill and decode end to end; inside decode its drafting and verifying, then the rest."""
    parts, at = [], 0.0
    queue, ttft = row.queue_s or 0.0, row.ttft_s
    if row.queue_s is not None:
        parts.append(("queue", 0.0, queue * 1e3))
        at = queue * 1e3
    if ttft is None:
        return parts
    parts.append(("prefill", at, (ttft - queue) * 1e3))
    decode, start = (row.e2e_s - ttft) * 1e3, ttft * 1e3
    parts.append(("decode", start, decode))
    draft, verify = row.draft_s * 1e3, min(row.verify_s * 1e3, decode)
    parts.append(("· draft", start, draft))
    parts.append(("· verify", start + draft, verify))
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
        column.markdown("  \n".join(f":gray[{name}] {value}" for name, value in items))


def _go() -> None:
    if wanted := str(st.session_state["wanted"]).strip():
        st.query_params["trace"] = wanted


context.live(page)
