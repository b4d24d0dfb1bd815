"""How the service does, and what is being tried on it."""

from __future__ import annotations

from urllib.parse import urlencode

import streamlit as st

from app.charts import latency
from app.components import context, operations
from app.components.cards import cards, first, verdict
from app.components.context import FIXED, Context, few, heading, parameters
from app.components.drawing import draw, draw_to_traces
from app.components.export import export
from app.components.shared import shared
from app.components.tables import GROUPS, breakdown, by_version
from app.queries import ledger, overview
from app.queries.database import settings
from engine.contracts import CANARY
from engine.store.panels.versions import SHOWN
from engine.store.repositories.overview import Slice

current = context.bar()
WORDS = {
    "15m": "15 minutes",
    "1h": "hour",
    "6h": "6 hours",
    "24h": "24 hours",
    "7d": "7 days",
    "30d": "30 days",
    FIXED: "window",
}


def head() -> None:
    here = current()
    now, before = overview.totals(here.part), overview.totals(here.part.before())
    serving = ledger.serving()
    context.renew("overview", serving.generation, now.empty)
    context.headline(verdict(serving, first(now), first(before), WORDS[here.range]))
    if now.empty:
        _how_to_begin()
    else:
        _cards(here)


def page() -> None:
    here = current()
    part = here.part
    if overview.totals(part).empty:
        return
    serving = ledger.serving()
    generation = serving.generation
    charted = here.charted()
    left, right = st.columns([3, 2])
    with left.container(border=True, height="stretch"):
        with st.container(horizontal=True, vertical_alignment="center", key="latency-of"):
            heading("Latency", "p50, p95, p99, log scale · drag to open the traces")
            metric = _metric()
        _percentiles(charted, generation, metric)
    with right.container(border=True, height="stretch"):
        _heat_map(charted, generation, metric)
    _by_version(charted, generation)
    _versions(here, generation, serving.roles)
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center", key="traffic-by"):
            goal = settings().telemetry.objectives
            said = f"goodput: TTFT up to {goal.ttft_s:g} s, TPOT up to {goal.tpot_s * 1e3:g} ms"
            heading("Traffic", f"{NAMES[metric]} as chosen above; {said}")
            by = _by()
        _traffic(here, by, metric)
    _operations(here)
    with st.container(horizontal=True, key="more"):
        asked = urlencode({"metric": "p95", **parameters(part)})
        st.link_button("Why did it change?", f"/explain?{asked}", icon=":material/account_tree:")
        export("overview", part)


@shared
def _cards(here: Context) -> None:
    now, before = overview.totals(here.part), overview.totals(here.part.before())
    st.html(cards(first(now), first(before), overview.over_time(here.charted().part), here.colours))


@shared
def _percentiles(here: Context, generation: int | None, metric: str) -> None:
    part = here.part
    frame = overview.over_time(part, (), (metric,)) if metric == "queue" else overview.over_time(part)
    arms = overview.over_time(overview.leading(part), ("arm", "policy_version"), (metric,))
    canary = arms if arms.empty else arms[arms["arm"] == CANARY]
    figure = latency.percentiles(frame, canary, ledger.marks(part, generation), here.window, here.colours, metric)
    draw_to_traces(figure, f"latency-{metric}", "Percentiles of latency over time, with deploys marked.")


@shared
def _heat_map(here: Context, generation: int | None, metric: str) -> None:
    heading("Latency heat map", f"requests by {NAMES[metric]} · drag to open the traces")
    marks = ledger.marks(here.part, generation)
    figure = latency.heat_map(overview.heat(here.part, metric), marks, here.window, here.colours, metric)
    draw_to_traces(figure, f"heat-{metric}", "How many requests took how long, over time.")


@shared
def _by_version(here: Context, generation: int | None) -> None:
    """What each version did over time."""
    part, colours, window = here.part, here.colours, here.window
    lines, marks = overview.leading(part), ledger.marks(part, generation)
    versions, capped = overview.over_time(lines, ("policy_version",), ()), few(part, lines)
    columns = st.columns(3)
    with columns[0].container(border=True):
        heading("Acceptance length", f"1 + accepted / steps, by version{capped}")
        figure = latency.by_version(versions, "acceptance_length", marks, window, colours)
        draw_to_traces(figure, "acceptance", "Acceptance length over time, a line a version.")
    with columns[1].container(border=True):
        heading("Output tokens", f"per second, by version{capped}")
        figure = latency.by_version(versions, "tokens_s", marks, window, colours, ",.1f")
        draw_to_traces(figure, "tokens", "Output tokens per second over time, a line a version.")
    with columns[2].container(border=True):
        heading("Acceptance by draft position", "% of steps that drafted")
        figure = latency.positions(overview.positions(lines), colours)
        draw(figure, "positions", "Share of drafted tokens accepted at each draft position, by version.")


@shared
def _versions(here: Context, generation: int | None, _roles: dict[int, str]) -> None:
    """What each version did in all; roles are the ledger's."""
    rows = overview.leading(here.part, SHOWN)
    with st.container(border=True):
        heading("Versions", f"that served in this window{few(here.part, rows)}; latency in ms")
        totals = overview.totals(rows, ("policy_version",))
        trends = overview.over_time(overview.leading(here.charted().part), ("policy_version",), ())
        st.html(by_version(totals, _requests(here.part), trends, _roles, here.colours))


@shared
def _traffic(here: Context, by: str, metric: str) -> None:
    part = here.part
    among = overview.leading(part, SHOWN) if by == "policy_version" else part
    st.html(breakdown(overview.totals(among, (by,), (metric,)), _requests(part), by, metric))


@shared
def _operations(here: Context) -> None:
    operations.panel(ledger.operations_record(4), first(overview.totals(here.part)).get("observed_gain"))


def _requests(part: Slice) -> float:
    return float(first(overview.totals(part))["requests"])


NAMES = {"e2e": "end-to-end latency", "ttft": "TTFT", "tpot": "TPOT", "queue": "queue time"}


def _by() -> str:
    """What the table of the traffic is told apart by."""
    words = {word: name for name, word in GROUPS.items()}
    chosen = st.segmented_control(
        "By", list(words), default="class", key="by", bind="query-params", required=True, label_visibility="collapsed"
    )
    return words[str(chosen or "class")]


def _metric() -> str:
    """Which latency the two charts are about."""
    chosen = st.segmented_control(
        "Latency", list(NAMES), default="e2e", key="latency", bind="query-params", required=True,
        label_visibility="collapsed", format_func=lambda name: name if name in ("e2e", "queue") else name.upper(),
    )  # fmt: skip
    return str(chosen or "e2e")


def _how_to_begin() -> None:
    engine = settings().engine
    st.info("No traffic yet. Choose a longer window, or send a request:", icon=":material/info:")
    st.code(
        f"curl http://{engine.host}:{engine.port}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f'  -d \'{{"model": "{engine.model}", "messages": [{{"role": "user", "content": "Hello"}}]}}\'',
        language="bash",
    )


context.live(head)
context.live(page, slowly=True)
