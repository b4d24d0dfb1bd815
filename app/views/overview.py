"""How the service does, and what is being tried on it."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app.charts import latency
from app.charts.theme import CONFIG
from app.components import context
from app.components.cards import cards, verdict
from app.components.tables import by_class, by_version
from app.queries import ledger, overview
from app.queries.database import settings
from engine.contracts import CANARY

current = context.bar()


def page() -> None:
    here = current()
    part, colours = here.part, here.colours
    serving = ledger.serving()
    now, before = overview.totals(part), overview.totals(part.before())
    st.markdown(verdict(serving, _first(now, part), _first(before, part)))
    context.age()
    if now.empty:
        _how_to_begin()
        return
    trend = overview.over_time(part)
    cards(_first(now, part), _first(before, part), trend)
    marks = ledger.marks(part)
    left, right = st.columns([3, 2])
    with left.container(border=True):
        st.markdown("**End-to-end latency** percentiles, ms, log scale")
        arms = overview.over_time(part, ("arm", "policy_version"))
        canary = arms[arms["arm"] == CANARY]
        figure = latency.percentiles(trend, canary, marks, colours)
        st.plotly_chart(figure, key="latency", config=CONFIG, theme=None)
    with right.container(border=True):
        st.markdown("**Latency heat map** requests by end-to-end latency")
        st.plotly_chart(latency.heat_map(overview.heat(part), colours), key="heat", config=CONFIG, theme=None)
    versions = overview.over_time(part, ("policy_version",))
    columns = st.columns(3)
    with columns[0].container(border=True):
        st.markdown("**Acceptance length** by version, tokens a verify step, bonus included")
        figure = latency.by_version(versions, "acceptance_length", marks, colours)
        st.plotly_chart(figure, key="acceptance", config=CONFIG, theme=None)
    with columns[1].container(border=True):
        st.markdown("**Output tokens** by version, a second")
        figure = latency.by_version(versions, "tokens_s", marks, colours, " / s")
        st.plotly_chart(figure, key="tokens", config=CONFIG, theme=None)
    with columns[2].container(border=True):
        st.markdown("**Acceptance by position** in the draft, % of steps that drafted")
        st.plotly_chart(
            latency.positions(overview.positions(part), colours), key="positions", config=CONFIG, theme=None
        )
    with st.container(border=True):
        st.markdown("**Traffic classes**")
        by_class(overview.totals(part, ("traffic_class",)))
    with st.container(border=True):
        st.markdown("**Versions** that served in this window")
        by_version(overview.totals(part, ("policy_version",)), versions, serving)


def _first(frame: pd.DataFrame, part: overview.Slice) -> pd.Series:
    """The one row of a total, with rates per second of the whole window."""
    if frame.empty:
        return pd.Series(dtype=float)
    row = frame.iloc[0].copy()
    row["tokens_s"] = row["output_tokens"] / (part.until - part.since).total_seconds()
    return row


def _how_to_begin() -> None:
    engine = settings().engine
    st.info("Nothing was served in this window. Choose a longer one, or send a request:", icon=":material/info:")
    st.code(
        f"curl http://{engine.host}:{engine.port}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f'  -d \'{{"model": "{engine.model}", "messages": [{{"role": "user", "content": "Hello"}}]}}\'',
        language="bash",
    )


context.live(page)
