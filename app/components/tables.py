"""The tables of the overview."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import streamlit as st

from app.charts.theme import Palette
from app.queries.ledger import Serving

Columns = dict[str, Any]
"""Streamlit's column configuration: a label or a typed column per name."""
Shades = Mapping[str, Callable[[str], str]]
"""Column → what colour a word of it has."""
NUMBER = st.column_config.NumberColumn
SHARE = st.column_config.ProgressColumn("share of requests", format="%.1f %%", min_value=0, max_value=100, width=128)
SHOWN: Columns = {
    "requests": NUMBER("requests", format="localized"),
    "e2e_p50": NUMBER("p50, ms", format="%.0f"),
    "e2e_p95": NUMBER("p95, ms", format="%.0f"),
    "e2e_p99": NUMBER("p99, ms", format="%.0f"),
    "ttft_p50": NUMBER("TTFT p50, ms", format="%.0f"),
    "tpot_p50": NUMBER("TPOT p50, ms", format="%.1f"),
    "acceptance_length": NUMBER("acceptance length", format="%.2f", help="1 + accepted / verify steps"),
    "error_rate": NUMBER("errors, %", format="%.2f"),
    "retry_rate": NUMBER("retries, %", format="%.2f"),
}


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


def breakdown(frame: pd.DataFrame, requests: float, by: str, metric: str) -> None:
    """One row a class, arm, version or replica: every percentile of one latency (ms), how its requests went, and its
    share of all the window's ``requests``, those of what is left out here too."""
    frame = _in_percent(frame.sort_values("requests", ascending=False))
    frame["share"] = 100 * frame["requests"] / requests
    frame["goodput_share"] = 100 * frame["goodput_share"]
    if by == "policy_version":
        frame[by] = [f"v{number}" for number in frame[by]]
    form = "%.1f" if metric in ("tpot", "queue") else "%.0f"
    columns: Columns = {
        by: GROUPS[by],
        "share": SHARE,
        "requests": NUMBER("requests", format="localized"),
        **{f"{metric}_{q}": NUMBER(f"{q}, ms", format=form) for q in ("p50", "p90", "p95", "p99", "p99.9")},
        "tokens_s": NUMBER("output tokens / s", format="%.1f"),
        "acceptance_length": SHOWN["acceptance_length"],
        "goodput_share": NUMBER("goodput, %", format="%.1f", help="requests within the objectives"),
        "error_rate": SHOWN["error_rate"],
        "retry_rate": SHOWN["retry_rate"],
        "preemptions": NUMBER("preemptions", format="localized"),
    }
    table(frame[list(columns)], columns, f"by-{by}")


def by_version(frame: pd.DataFrame, requests: float, trend: pd.DataFrame, serving: Serving, colours: Palette) -> None:
    """One row a version: role, share of all the window's ``requests``, and how its acceptance length moved."""
    frame = _in_percent(frame.sort_values("policy_version", ascending=False))
    frame["version"] = [f"v{number}" for number in frame["policy_version"]]
    frame["role"] = [serving.role(int(number)) for number in frame["policy_version"]]
    frame["share"] = 100 * frame["requests"] / requests
    frame["trend"] = trends(trend, frame["policy_version"])
    columns: Columns = {
        "version": st.column_config.TextColumn("version", width=70),
        "role": st.column_config.TextColumn("role", width=80),
        "share": SHARE,
        **{name: column for name, column in SHOWN.items() if name != "retry_rate"},
        "trend": sparkline("acceptance length over time", frame["trend"], 1.0),
    }
    table(frame[list(columns)], columns, "versions", {"version": by_identity(colours)})


def trends(over_time: pd.DataFrame, versions: pd.Series, column: str = "acceptance_length") -> list[list[float]]:
    """How a number of each version moved: a sparkline a row, empty where it served nothing."""
    if over_time.empty:
        return [[] for _ in versions]
    moved = over_time.groupby("policy_version")[column].agg(lambda v: v.dropna().round(3).tolist())
    return [moved.get(version, []) for version in versions]


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


def _in_percent(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(**{name: frame[name] * 100 for name in ("error_rate", "retry_rate")})
