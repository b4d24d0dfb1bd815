"""The list of traces: what is listed, which page of it, and the page itself. All of it is in the URL."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import pandas as pd
import streamlit as st

from app.charts.theme import Palette
from app.components.cards import card, row
from app.components.tables import NUMBER, Columns, by_identity, table
from app.queries.traces import PAGE
from engine.contracts import Status
from engine.percent import percent
from engine.store.repositories.overview import Slice
from engine.store.repositories.traces import LATENCIES, Filter, Place

STATUSES = ["All statuses", *(status.value for status in Status)]
ORDERS = {"Newest first": "newest", "Slowest first": "slowest"}
KEYS = {"newest": "started_at", "slowest": "e2e_s"}
HIDDEN: dict[str, Any] = {"label_visibility": "collapsed"}
MORE = ("of", "max_ms", "length_from", "length_to", "output_from", "replica", "generation", "finish", "retried",
        "preempted")  # fmt: skip
PLACE = "place"


def filters() -> tuple[Filter, str]:
    """The controls; what of the slice is listed, and in which order."""
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="filters"):
        status = st.selectbox("Status", STATUSES, key="status", bind="query-params", width=142, **HIDDEN)
        order = st.selectbox("Order", ORDERS, key="order", bind="query-params", width=162, **HIDDEN)
        least = _number("At least, ms", "min_ms", 0, 100, 170)
        tenant = _words("Tenant", "tenant", 130)
        conversation = _words("Conversation", "conversation", 170)
        set_now = sum(st.session_state.get(name) not in (None, "", False, "e2e") for name in MORE)
        with st.popover(f"More filters{f' · {set_now}' if set_now else ''}", icon=":material/filter_list:"):
            more = _more()
        st.text_input("Trace id", key="wanted", width=190, on_change=_go, placeholder="Trace id", **HIDDEN)
    chosen = Filter(
        status=None if status == STATUSES[0] else status,
        tenant=tenant,
        conversation=conversation,
        min_s=least / 1e3 if least else None,
        **more,
    )
    return chosen, ORDERS[str(order)]


def _more() -> dict[str, Any]:
    of = st.segmented_control(
        "Which latency the bounds are of", list(LATENCIES), default="e2e", key="of", bind="query-params", required=True
    )
    left, right = st.columns(2)
    with left:
        most = _number("Below, ms", "max_ms", 0, 100)
        low = _number("Acceptance length from", "length_from", 1.0, 0.1)
        replica = _words("Replica", "replica")
        generation = _number("Generation", "generation", 1, 1)
    with right:
        output = _number("Output tokens from", "output_from", 1, 16)
        high = _number("Acceptance length below", "length_to", 1.0, 0.1)
        finish = _words("Finish reason", "finish")
        retried = st.checkbox("Retried", key="retried", bind="query-params")
        preempted = st.checkbox("Preempted", key="preempted", bind="query-params")
    return {
        "latency": str(of or "e2e"),
        "max_s": most / 1e3 if most else None,
        "min_length": low,
        "max_length": high,
        "min_output": output,
        "replica": replica,
        "generation": generation,
        "finish_reason": finish,
        "retried": retried,
        "preempted": preempted,
    }


def _number(label: str, key: str, least: float, step: float, width: int | None = None) -> Any:
    inline: dict[str, Any] = {} if width is None else {"width": width, "placeholder": label, **HIDDEN}
    return st.number_input(label, min_value=least, step=step, value=None, key=key, bind="query-params", **inline)


def _words(label: str, key: str, width: int | None = None) -> str | None:
    inline: dict[str, Any] = {} if width is None else {"width": width, "placeholder": label, **HIDDEN}
    return (st.text_input(label, key=key, bind="query-params", **inline) or "").strip() or None


def place(part: Slice, chosen: Filter, order: str) -> Place | None:
    """Which page the URL asks for; None is the first, also where its place is one of another list."""
    parts = str(st.query_params.get(PLACE, "")).split("~")
    if len(parts) != 5 or parts[4] != name_of(part, chosen, order):
        return None
    way, passed, value, trace_id, _ = parts
    try:
        at = datetime.fromisoformat(value) if order == "newest" else float(value)
        return Place(at, UUID(trace_id), max(int(passed), 0), way == "back")
    except ValueError:
        return None


def pages(frame: pd.DataFrame, at: Place | None, many: int, is_all: bool, mark: str, order: str) -> None:
    """The way to the pages beside this one. ``mark`` names the list that they are pages of."""
    before = _before(frame, at)
    said = f"{before + 1:,} to {before + len(frame):,} of {'' if is_all else 'more than '}{many:,}"
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall", width="content", key="pages"):
        _step("First", "first_page", "", before == 0)
        _step("Previous", "chevron_left", _mark(frame.iloc[0], "back", before, mark, order), before == 0)
        behind = before + len(frame)
        is_last = len(frame) < PAGE or (is_all and behind >= many)
        _step("Next", "chevron_right", _mark(frame.iloc[-1], "on", behind, mark, order), is_last)
        st.caption(said, width="content")


def _step(name: str, icon: str, to: str, is_idle: bool) -> None:
    st.button(name, icon=f":material/{icon}:", key=f"page-{name}", disabled=is_idle, on_click=_turn, args=(to,))


def _turn(to: str) -> None:
    if to:
        st.query_params[PLACE] = to
    elif PLACE in st.query_params:
        del st.query_params[PLACE]


def _before(frame: pd.DataFrame, at: Place | None) -> int:
    """Rows before this page: exact while nothing new has come, which is what a list of moving traffic can say."""
    if at is None:
        return 0
    return max(at.passed - len(frame), 0) if at.back else at.passed


def _mark(row: pd.Series, way: str, passed: int, mark: str, order: str) -> str:
    value = row[KEYS[order]]
    text = value.isoformat() if order == "newest" else repr(float(value))
    return f"{way}~{passed}~{text}~{row['trace_id']}~{mark}"


def name_of(part: Slice, chosen: Filter, order: str) -> str:
    """A short name of a list, whatever its window is by now."""
    of = (part.traffic_class, part.arm, part.version, chosen, order)
    return f"{zlib.crc32(repr(of).encode()):08x}"


def summary(frame: pd.DataFrame, colours: Palette) -> str:
    """HTML of cards: what the rows of this page have in common, before the grid is there to read them in."""
    drafted = frame[frame["steps"] > 0]
    failed = int((frame["status"] != Status.OK.value).sum())
    length = f"{1 + drafted['accepted'].sum() / drafted['steps'].sum():.2f}" if len(drafted) else "–"
    shown = {
        "Rows shown": f"{len(frame):,}",
        "e2e p50": _ms(frame["e2e_ms"], 0.5),
        "e2e p95": _ms(frame["e2e_ms"], 0.95),
        "TTFT p50": _ms(frame["ttft_ms"], 0.5),
        "Accept. length": length,
    }
    made = [card(label, value, "", colours.muted) for label, value in shown.items()]
    made.append(card("Not ok", f"{failed:,}", percent(failed / len(frame)) if failed else "", colours.bad))
    return row(made, is_low=True)


def _ms(values: pd.Series, q: float) -> str:
    known = values.dropna()
    return f"{known.quantile(q):,.0f} ms" if len(known) else "–"


def rows(frame: pd.DataFrame, colours: Palette) -> None:
    """The page; a row that is chosen opens its trace."""
    frame = frame.assign(version=[f"v{version}" for version in frame["policy_version"]])
    columns: Columns = {
        "started_at": st.column_config.DatetimeColumn("began", format="MMM D, HH:mm:ss.SSS"),
        "traffic_class": "class",
        "arm": "arm",
        "version": st.column_config.TextColumn("version", width=70),
        "status": "status",
        "e2e_ms": NUMBER("e2e, ms", format="%.0f"),
        "ttft_ms": NUMBER("TTFT, ms", format="%.0f"),
        "tpot_ms": NUMBER("TPOT, ms", format="%.1f"),
        "queue_ms": NUMBER("queue, ms", format="%.0f"),
        "prompt_tokens": NUMBER("prompt", help="tokens"),
        "output_tokens": NUMBER("output", help="tokens"),
        "drafted": NUMBER("drafted", help="tokens"),
        "accepted": NUMBER("accepted", help="tokens"),
        "acceptance_length": NUMBER("length", format="%.2f", help="acceptance length: 1 + accepted / verify steps"),
        "retry": NUMBER("retry", width=60),
        "tenant": "tenant",
        "trace_id": "trace",
    }
    event = table(
        frame[list(columns)],
        columns,
        "list",
        {"version": by_identity(colours)},
        on_select="rerun",
        selection_mode="single-row",
        height=min(38 + 35 * len(frame), 720),
    )
    chosen: Sequence[int] = event.selection.rows
    if chosen:
        st.query_params["trace"] = frame.iloc[chosen[0]]["trace_id"]
        st.rerun()


def _go() -> None:
    if wanted := str(st.session_state["wanted"]).strip():
        st.query_params["trace"] = wanted
