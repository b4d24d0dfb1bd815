"""How the service does, and what is being tried on it."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from app.charts import latency
from app.charts.theme import CONFIG
from app.components import context
from app.components.cards import cards, verdict
from app.components.context import heading
from app.components.tables import by_class, by_version
from app.queries import ledger, overview
from app.queries.database import settings
from engine.contracts import CANARY

current = context.bar()
WORDS = {"15m": "15 minutes", "1h": "hour", "6h": "6 hours", "24h": "24 hours", "7d": "7 days"}


def page() -> None:
    here = current()
    part, colours, window = here.part, here.colours, here.window
    serving = ledger.serving()
    now, before = overview.totals(part), overview.totals(part.before())
    context.headline(verdict(serving, _first(now, part), _first(before, part.before()), WORDS[here.range]))
    if now.empty:
        _how_to_begin()
        return
    trend = overview.over_time(part)
    cards(_first(now, part), _first(before, part.before()), trend)
    marks = ledger.marks(part)
    left, right = st.columns([3, 2])
    with left.container(border=True):
        heading("End-to-end latency", "percentiles, log scale")
        arms = overview.over_time(part, ("arm", "policy_version"))
        canary = arms[arms["arm"] == CANARY]
        _draw(latency.percentiles(trend, canary, marks, window, colours), "latency")
    with right.container(border=True):
        heading("Latency heat map", "requests by end-to-end latency")
        _draw(latency.heat_map(overview.heat(part), window, colours), "heat")
    versions = overview.over_time(part, ("policy_version",))
    columns = st.columns(3)
    with columns[0].container(border=True):
        heading("Acceptance length", "1 + accepted / steps, by version")
        _draw(latency.by_version(versions, "acceptance_length", marks, window, colours), "acceptance")
    with columns[1].container(border=True):
        heading("Output tokens", "per second, by version")
        _draw(latency.by_version(versions, "tokens_s", marks, window, colours, ",.1f"), "tokens")
    with columns[2].container(border=True):
        heading("Acceptance by draft position", "% of steps that drafted")
        _draw(latency.positions(overview.positions(part), colours), "positions")
    with st.container(border=True):
        heading("Versions", "that served in this window; latency in ms")
        by_version(overview.totals(part, ("policy_version",)), versions, serving, colours)
    with st.container(border=True):
        heading("Traffic classes", "latency in ms")
        by_class(overview.totals(part, ("traffic_class",)))


def _draw(figure: go.Figure, key: str) -> None:
    st.plotly_chart(figure, key=key, config=CONFIG, theme=None)


def _first(frame: pd.DataFrame, part: overview.Slice) -> pd.Series:
    """The one row of a total, with rates per second of the whole window."""
    if frame.empty:
        return pd.Series(dtype=float)
    row = frame.iloc[0].copy()
    row["tokens_s"] = row["output_tokens"] / (part.until - part.since).total_seconds()
    return row


def _how_to_begin() -> None:
    engine = settings().engine
    st.info("No traffic yet. Choose a longer window, or send a request:", icon=":material/info:")
    st.code(
        f"curl http://{engine.host}:{engine.port}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f'  -d \'{{"model": "{engine.model}", "messages": [{{"role": "user", "content": "Hello"}}]}}\'',
        language="bash",
    )


context.live(page)
