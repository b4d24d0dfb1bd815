"""Tables as all pages have them, and those of the overview."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from app.charts.theme import Palette, floats
from app.components import sheets

Columns = dict[str, Any]
"""Streamlit's column configuration: a label or a typed column per name."""
Shades = Mapping[str, Callable[[str], str]]
"""Column → what colour a word of it has."""
NUMBER = st.column_config.NumberColumn
SHARE = st.column_config.ProgressColumn("share of requests", format="%.1f %%", min_value=0, max_value=100, width=116)
LENGTH = sheets.number("acceptance length", "{:.2f}", note="1 + accepted / verify steps")
ERRORS = sheets.number("errors, %", "{:.2f}", 100.0)
REQUESTS = sheets.number("requests", "{:,.0f}")
GROUPS = {"traffic_class": "class", "arm": "arm", "policy_version": "version", "replica_id": "replica"}
"""What traffic is told apart by, and its word."""


def table(data: pd.DataFrame, columns: Columns, key: str, shades: Shades | None = None, **more: Any) -> Any:
    """A table as all of them are: no index, a dash where there is no value. ``shades``: columns of coloured words.

    They are tags and not a styled frame, of which pandas and Streamlit write every cell as text and as a rule of CSS:
    80 to 130 ms of processor for a page of traces, where this takes 5.
    """
    data = in_utc(data)
    for name, shade in (shades or {}).items():
        words = [word for word in dict.fromkeys(data[name]) if word]
        tags: Any = st.column_config.MultiselectColumn(name, options=words, color=[shade(word) for word in words])
        given = columns.get(name) or {}
        given = {"label": given} if isinstance(given, str) else given
        kept = {key: value for key, value in given.items() if value is not None and key != "type_config"}
        columns = columns | {name: tags | kept}
        data = data.assign(**{name: [[word] if word else [] for word in data[name]]})
    return st.dataframe(data, column_config=columns, hide_index=True, placeholder="–", key=key, **more)


def breakdown(frame: pd.DataFrame, requests: float, by: str, metric: str) -> str:
    """HTML of one row a class, arm, version or replica: every percentile of one latency (ms), how its requests went,
    and its share of all the window's ``requests``, those of what is left out here too."""
    frame = frame.sort_values("requests", ascending=False)
    frame["share"] = 100 * frame["requests"] / requests
    form = "{:,.1f}" if metric in ("tpot", "queue") else "{:,.0f}"
    columns = {
        by: sheets.words(GROUPS[by]) if by != "policy_version" else sheets.number("version", "v{:.0f}"),
        "share": sheets.share("share of requests"),
        "requests": REQUESTS,
        **{f"{metric}_{q}": sheets.number(f"{q}, ms", form) for q in ("p50", "p90", "p95", "p99", "p99.9")},
        "tokens_s": sheets.number("output tokens / s", "{:,.1f}"),
        "acceptance_length": LENGTH,
        "goodput_share": sheets.number("goodput, %", "{:.1f}", 100.0, "requests within the objectives"),
        "error_rate": ERRORS,
        "retry_rate": sheets.number("retries, %", "{:.2f}", 100.0),
        "preemptions": sheets.number("preemptions", "{:,.0f}"),
    }
    return sheets.written(frame, columns, f"Traffic by {GROUPS[by]}")


def by_version(
    frame: pd.DataFrame, requests: float, trend: pd.DataFrame, roles: Mapping[int, str], colours: Palette
) -> str:
    """HTML of one row a version: role, share of all the window's ``requests``, and how its acceptance length moved."""
    frame = frame.sort_values("policy_version", ascending=False)
    frame["version"] = [f"v{number}" for number in frame["policy_version"]]
    frame["role"] = [roles.get(number, "") for number in frame["policy_version"]]
    frame["share"] = 100 * frame["requests"] / requests
    frame["trend"] = trends(trend, frame["policy_version"])
    latencies = {"e2e_p50": "p50, ms", "e2e_p95": "p95, ms", "e2e_p99": "p99, ms", "ttft_p50": "TTFT p50, ms"}
    columns = {
        "version": sheets.words("version", by_identity(colours)),
        "role": sheets.words("role"),
        "share": sheets.share("share of requests"),
        "requests": REQUESTS,
        **{name: sheets.number(label, "{:,.0f}") for name, label in latencies.items()},
        "tpot_p50": sheets.number("TPOT p50, ms", "{:,.1f}"),
        "acceptance_length": LENGTH,
        "error_rate": ERRORS,
        "trend": sheets.trend("acceptance length over time", frame["trend"], 1.0, colours.quantiles[1]),
    }
    return sheets.written(frame, columns, "Versions that served in this window")


def trends(over_time: pd.DataFrame, versions: pd.Series, column: str = "acceptance_length") -> list[list[float]]:
    """How a number of each version moved: a sparkline a row, empty where it served nothing."""
    if over_time.empty:
        return [[] for _ in versions]
    of, values = over_time["policy_version"].to_numpy(), floats(over_time, column).round(3)
    known = ~np.isnan(values)
    return [values[known & (of == version)].tolist() for version in versions]


def sparkline(title: str, moved: pd.Series, least: float) -> Any:
    """A sparkline a row, all on one scale from ``least`` up, so that rows can be compared."""
    most = max((value for values in moved for value in values), default=least + 1.0)
    return st.column_config.LineChartColumn(title, y_min=least, y_max=max(1.1 * most, least + 0.5), width=96)


def by_identity(colours: Palette) -> Callable[[str], str]:
    """The colour that a version ("v3") has in every chart."""
    return lambda version: colours.version(int(version.removeprefix("v")))


def in_utc(frame: pd.DataFrame) -> pd.DataFrame:
    """Instants as UTC without saying so, as every page shows them; on their way to the browser zones would be dropped
    with a warning."""
    zoned = frame.select_dtypes("datetimetz").columns
    return frame.assign(**{name: frame[name].dt.tz_convert(None) for name in zoned}) if len(zoned) else frame
