"""Rollups as DataFrames: one row a time bin or group. Durations in milliseconds, as pages show them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pandas as pd
import streamlit as st

from app.queries.database import database
from engine.store import histogram
from engine.store.repositories import overview
from engine.store.repositories.overview import Slice

TTL = timedelta(seconds=4)
QS = (0.5, 0.95, 0.99)
LATENCIES = ("e2e", "ttft", "tpot")
JOINED = 8
"""Histogram buckets in one row of the heat map."""


@st.cache_data(ttl=TTL, show_spinner=False)
def totals(part: Slice, by: tuple[str, ...] = ()) -> pd.DataFrame:
    """One row a group: sums, the ratios made of them, and p50, p95, p99 of e2e, p50 of TTFT and TPOT (ms)."""
    with database().read() as session:
        frame = with_ratios(pd.DataFrame(overview.sums(session, part, by)))
        for metric in LATENCIES:
            found = pd.DataFrame(overview.quantiles(session, part, metric, QS, by))
            frame = _join(frame, found, metric, list(by))
    return frame


@st.cache_data(ttl=TTL, show_spinner=False)
def over_time(part: Slice, by: tuple[str, ...] = ()) -> pd.DataFrame:
    """The same per time bin ("at"), the middle of it, with a row for every bin: values are missing without traffic."""
    width = _bin(part, 90)
    with database().read() as session:
        frame = with_ratios(pd.DataFrame(overview.sums(session, part, by, width)))
        for metric in LATENCIES:
            found = pd.DataFrame(overview.quantiles(session, part, metric, QS, by, width))
            frame = _join(frame, found, metric, ["at", *by])
    if frame.empty:
        return frame
    seconds = _seconds_inside(frame["at"], width, part)
    frame["requests_s"] = frame["requests"] / seconds
    frame["tokens_s"] = frame["output_tokens"] / seconds
    whole = seconds >= width.total_seconds() / 2  # a bin that has hardly begun says more about chance
    if whole.any():
        frame = frame[whole]
    full = _with_gaps(frame, width, list(by))
    full["at"] = (full["at"] + width / 2).clip(upper=pd.Timestamp(part.until))
    return full


@st.cache_data(ttl=TTL, show_spinner=False)
def heat(part: Slice, metric: str = "e2e") -> pd.DataFrame:
    """(at, until, low, high, requests) for the latency heat map, ms; buckets joined by eights, 17 % wide."""
    width = _bin(part, 60)
    with database().read() as session:
        rows = overview.buckets(session, part, metric, width)
    frame = pd.DataFrame(rows).rename(columns={"n": "requests"})
    if frame.empty:
        return frame
    frame["bucket"] = frame["bucket"] // JOINED * JOINED
    frame = frame.groupby(["at", "bucket"], as_index=False)["requests"].sum()
    frame["until"] = frame["at"] + width
    frame["low"] = [histogram.upper(int(bucket) - 1) * 1e3 for bucket in frame["bucket"]]
    frame["high"] = [histogram.upper(int(bucket) - 1 + JOINED) * 1e3 for bucket in frame["bucket"]]
    return frame


def _bin(part: Slice, most: int) -> timedelta:
    """Bins wide enough for some 25 requests each: percentiles of fewer say more about chance than about the service."""
    total = totals(part)
    requests = int(total["requests"].iloc[0]) if not total.empty else 0
    return part.bin(max(24, min(most, requests // 25)))


@st.cache_data(ttl=TTL, show_spinner=False)
def positions(part: Slice) -> pd.DataFrame:
    """Unconditional acceptance by draft position and version: accepted at the position / verify steps that drafted."""
    with database().read() as session:
        frame = pd.DataFrame(overview.positions(session, part, ("policy_version",)))
    if not frame.empty:
        first = frame.groupby("policy_version")["drafted"].transform("max")
        frame["acceptance"] = frame["accepted"] / first.where(first > 0)
    return frame


@st.cache_data(ttl=TTL, show_spinner=False)
def known(part: Slice) -> dict[str, list[Any]]:
    with database().read() as session:
        return overview.known(session, part)


@st.cache_data(ttl=timedelta(seconds=1), show_spinner=False)
def newest() -> pd.Timestamp | None:
    with database().read() as session:
        at = overview.newest(session)
    return pd.Timestamp(at) if at is not None else None


def with_ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """Ratios are made here, of counts: acceptance length is 1 + accepted / steps, bonus included."""
    if frame.empty or frame["requests"].isna().all():
        return pd.DataFrame()
    steps, drafted, decode = (frame[name].where(frame[name] > 0) for name in ("steps", "drafted", "decode_s"))
    frame["acceptance_length"] = 1 + frame["accepted"] / steps
    frame["acceptance_rate"] = frame["accepted"] / drafted
    frame["decode_tokens_s"] = (frame["output_tokens"] - frame["requests"]).clip(lower=0) / decode
    frame["error_rate"] = frame["errors"] / frame["requests"]
    frame["retry_rate"] = frame["retries"] / frame["requests"]
    frame["draft_share"] = frame["draft_s"] / (frame["draft_s"] + frame["verify_s"]).where(lambda total: total > 0)
    return frame


def _join(frame: pd.DataFrame, found: pd.DataFrame, metric: str, keys: list[str]) -> pd.DataFrame:
    names = {f"q{q * 100:g}": f"{metric}_p{q * 100:g}" for q in QS}
    if frame.empty or found.empty:
        return frame.assign(**dict.fromkeys(names.values(), float("nan")))
    found = found.rename(columns=names)
    found[list(names.values())] *= 1e3
    return frame.merge(found, on=keys, how="left") if keys else pd.concat([frame, found], axis=1)


def _seconds_inside(at: pd.Series, width: timedelta, part: Slice) -> pd.Series:
    """How much of each bin lies in the window and in the past, seconds: the first and last bins are cut."""
    begins = at.clip(lower=pd.Timestamp(part.since).floor("min"))
    ends = (at + width).clip(upper=min(pd.Timestamp(part.until), pd.Timestamp.now("UTC")))
    return (ends - begins).dt.total_seconds().clip(lower=1.0)


def _with_gaps(frame: pd.DataFrame, width: timedelta, by: list[str]) -> pd.DataFrame:
    every = pd.date_range(frame["at"].min(), frame["at"].max(), freq=width)
    if not by:
        return frame.set_index("at").reindex(every).rename_axis("at").reset_index()
    parts = []
    for group, rows in frame.groupby(by):
        full = rows.set_index("at").reindex(every).rename_axis("at").reset_index()
        full[by] = list(group)
        parts.append(full)
    return pd.concat(parts, ignore_index=True)
