"""Panels as DataFrames: one row a time bin or group. Durations in milliseconds, as pages show them."""

from __future__ import annotations

import time
from collections import deque
from datetime import timedelta
from typing import Any

import pandas as pd
import streamlit as st

from app.queries.database import database
from engine.store.panels import PANELS, speculation, traffic, versions
from engine.store.repositories import overview
from engine.store.repositories.overview import Slice

TTL = timedelta(minutes=2)
"""Windows that move do so in steps (``context.window``), and a step has a key of its own: this only frees memory."""
ENTRIES = 400
LATENCIES = ("e2e", "ttft", "tpot")
KEPT = 500

kept = st.cache_data(ttl=TTL, max_entries=ENTRIES, show_spinner=False, hash_funcs={Slice: repr})
"""An answer about a slice, kept for all sessions. Without its ``repr`` Streamlit would pickle every field of the slice
at each look."""


@kept
def rows(name: str, part: Slice) -> pd.DataFrame:
    """The rows of a panel by its name, as `slipstream query` prints them."""
    began = time.perf_counter()
    with database().read() as session:
        found = pd.DataFrame(PANELS[name].read(session, part))
    timings().append((name, (time.perf_counter() - began) * 1e3))
    return found


@st.cache_resource
def timings() -> deque[tuple[str, float]]:
    """What the last queries of this dashboard took: (panel, ms)."""
    return deque(maxlen=KEPT)


@kept
def totals(part: Slice, by: tuple[str, ...] = (), latencies: tuple[str, ...] = LATENCIES) -> pd.DataFrame:
    """One row a group: sums, the ratios made of them, and the percentiles of each latency (ms)."""
    began = time.perf_counter()
    with database().read() as session:
        frame = numbers(pd.DataFrame(traffic.totals(session, part, by, latencies)), by)
    timings().append((f"totals by {', '.join(by) or 'nothing'}", (time.perf_counter() - began) * 1e3))
    return frame


@kept
def over_time(
    part: Slice, by: tuple[str, ...] = (), latencies: tuple[str, ...] = LATENCIES, most: int = 90
) -> pd.DataFrame:
    """The same per time bin ("at", its middle), with a row for every bin: values are missing without traffic."""
    began = time.perf_counter()
    with database().read() as session:
        frame = numbers(pd.DataFrame(traffic.over_time(session, part, by, latencies, most)), ("at", *by))
    timings().append((f"over time by {', '.join(by) or 'nothing'}", (time.perf_counter() - began) * 1e3))
    if frame.empty:
        return frame
    width = timedelta(seconds=float(frame["width_s"].iloc[0]))
    full = _with_gaps(frame, width, list(by))
    full["at"] = (full["at"] + width / 2).clip(upper=pd.Timestamp(part.until))
    return full


@kept
def leading(part: Slice, most: int = versions.DRAWN) -> Slice:
    """The slice, where many versions served in it of those with the most requests: as many as a chart can show."""
    with database().read() as session:
        return versions.among(session, part, most)


@kept
def heat(part: Slice, metric: str = "e2e") -> pd.DataFrame:
    """(at, until, low, high, requests) for the latency heat map, ms."""
    with database().read() as session:
        frame = pd.DataFrame(traffic.heat(session, part, metric))
    if frame.empty:
        return frame
    frame["until"] = frame["at"] + pd.to_timedelta(frame["width_s"], unit="s")
    return frame.rename(columns={"low_ms": "low", "high_ms": "high"})


def positions(part: Slice) -> pd.DataFrame:
    """Unconditional acceptance by draft position and version: accepted at the position / verify steps that drafted."""
    return numbers(rows("speculation.positions", part), ())


@kept
def alarm_band(part: Slice) -> tuple[float, float] | None:
    with database().read() as session:
        return speculation.alarm_band(session, part)


@kept
def known(part: Slice) -> dict[str, list[Any]]:
    with database().read() as session:
        return overview.known(session, part)


@st.cache_data(ttl=timedelta(seconds=1), show_spinner=False)
def newest() -> pd.Timestamp | None:
    with database().read() as session:
        at = overview.newest(session)
    return pd.Timestamp(at) if at is not None else None


def numbers(frame: pd.DataFrame, keys: tuple[str, ...]) -> pd.DataFrame:
    """What has no value is nan and not None, so that columns are numbers whatever is missing."""
    for name in frame.columns:
        if name not in (*keys, "at") and frame[name].dtype == object and not frame[name].map(_is_text).any():
            frame[name] = pd.to_numeric(frame[name], errors="coerce")
    return frame


def _is_text(value: object) -> bool:
    return isinstance(value, (str, list, dict))


def _with_gaps(frame: pd.DataFrame, width: timedelta, by: list[str]) -> pd.DataFrame:
    every = pd.date_range(frame["at"].min(), frame["at"].max(), freq=pd.Timedelta(width))
    if not by:
        return frame.set_index("at").reindex(every).rename_axis("at").reset_index()
    parts = []
    for group, of in frame.groupby(by):
        full = of.set_index("at").reindex(every).rename_axis("at").reset_index()
        full[by] = list(group)
        parts.append(full)
    return pd.concat(parts, ignore_index=True)
