"""The tables of the overview."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from app.queries.ledger import Serving

Columns = dict[str, Any]
"""Streamlit's column configuration: a label or a typed column per name."""
NUMBER = st.column_config.NumberColumn
SHOWN: Columns = {
    "requests": NUMBER("requests", format="localized"),
    "e2e_p50": NUMBER("p50, ms", format="%.0f"),
    "e2e_p95": NUMBER("p95, ms", format="%.0f"),
    "e2e_p99": NUMBER("p99, ms", format="%.0f"),
    "ttft_p50": NUMBER("TTFT p50, ms", format="%.0f"),
    "tpot_p50": NUMBER("TPOT p50, ms", format="%.1f"),
    "acceptance_length": NUMBER("acceptance length", format="%.2f", help="1 + accepted / verify steps"),
    "error_rate": NUMBER("errors", format="percent"),
    "retry_rate": NUMBER("retries", format="percent"),
}


def by_class(frame: pd.DataFrame) -> None:
    """One row a traffic class."""
    columns: Columns = {"traffic_class": "class", **SHOWN}
    frame = frame.sort_values("requests", ascending=False)
    st.dataframe(frame[list(columns)], column_config=columns, hide_index=True, key="classes")


def by_version(frame: pd.DataFrame, trend: pd.DataFrame, serving: Serving) -> None:
    """One row a version: role, share of the traffic, and how its acceptance length moved."""
    frame = frame.sort_values("policy_version", ascending=False)
    frame["version"] = [f"v{number}" for number in frame["policy_version"]]
    frame["role"] = [serving.role(int(number)) for number in frame["policy_version"]]
    frame["share"] = frame["requests"] / frame["requests"].sum()
    frame["trend"] = [
        trend.loc[trend["policy_version"] == number, "acceptance_length"].dropna().round(3).tolist()
        for number in frame["policy_version"]
    ]
    columns: Columns = {
        "version": "version",
        "role": "role",
        "share": st.column_config.ProgressColumn("share of requests", format="percent", min_value=0.0, max_value=1.0),
        **SHOWN,
        "trend": st.column_config.LineChartColumn("acceptance length", y_min=1.0),
    }
    st.dataframe(frame[list(columns)], column_config=columns, hide_index=True, key="versions")
