"""Single requests: find one, see where its time went and where each of its tokens came from."""

from __future__ import annotations

from collections import Counter
from html import escape
from urllib.parse import urlencode
from uuid import UUID

import streamlit as st

from app.charts import trace as charts
from app.charts.theme import Palette
from app.components import context, tokens, trace_list
from app.components.context import heading, plain
from app.components.drawing import draw
from app.components.tokens import Origin
from app.queries import traces, versions
from engine.store import frames
from engine.store.models import TraceRow
from engine.store.repositories.overview import Slice
from engine.store.repositories.traces import Filter, Trace

current = context.bar()
EXPORTED = 100_000
"""Rows of a download at most."""


def page() -> None:
    here = current()
    asked = st.query_params.get("trace")
    if asked:
        _one(asked, here.colours)
        return
    chosen, order = trace_list.filters()
    many, is_all = traces.matching(here.part, chosen)
    place = trace_list.place(here.part, chosen, order)
    frame = traces.listed(here.part, chosen, order, place)
    if frame.empty and place is not None:  # what was here has left the window
        place = None
        frame = traces.listed(here.part, chosen, order, place)
    if frame.empty:
        context.headline("**No request** matches.")
        st.info("Choose a longer window or fewer filters.", icon=":material/info:")
        return
    many = max(many, len(frame))
    context.headline(f"**{'' if is_all else 'More than '}{many:,}** requests. Choose one to open it.")
    st.html(trace_list.summary(frame, here.colours))
    trace_list.rows(frame, here.colours)
    with st.container(horizontal=True, vertical_alignment="center", key="below"):
        name = trace_list.name_of(here.part, chosen, order)
        trace_list.pages(frame, place, many, is_all, name, order)
        st.space("stretch")
        st.link_button("Why did it change?", context.link("explain", here.part), icon=":material/account_tree:")
        _download(here.part, chosen, order, min(many, EXPORTED))


def _download(part: Slice, chosen: Filter, order: str, many: int) -> None:
    """The whole list, not only the page that is shown."""
    with st.popover("Export", icon=":material/download:"):
        form = st.segmented_control("Format", frames.FORMATS, default="csv", key="form", required=True) or "csv"
        st.download_button(
            f"Download {many:,} rows",
            lambda: frames.encode(traces.every(part, chosen, order, EXPORTED), str(form), context.parameters(part)),
            file_name=f"traces.{form}",
            key="download",
            on_click="ignore",
        )


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
        _influence(row)


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
        "failed drafts": row.draft_errors,
    }
    for column, chunk in zip(st.columns(3), range(3), strict=True):
        items = list(fields.items())[chunk::3]
        # HTML with everything escaped: as Markdown, a client's own words could fetch images and disguise links.
        column.html(
            "<br>".join(f'<span style="opacity:.65">{name}</span> {escape(str(value))}' for name, value in items)
        )


def _influence(row: TraceRow) -> None:
    """What this request taught, and what made the version that served it."""
    taught = versions.taught_by_trace(row.trace_id)
    said = ", ".join(f"[v{number}](/versions?about=v{number})" for number in taught[-40:]) or "no version"
    more = f" and {len(taught) - 40:,} older ones" if len(taught) > 40 else ""
    own = f"[v{row.policy_version}](/versions?about=v{row.policy_version})"
    text = f"It taught {said}{more}. It was served by {own}, whose page says which traffic made that."
    if row.tenant:
        asked = urlencode({"tenant": row.tenant})
        text += f" [What {plain(row.tenant)} taught](/versions?{asked})."
    st.markdown(text)
    st.caption(f"Permalink: [/traces?trace={row.trace_id}](/traces?trace={row.trace_id})")


context.live(page)
