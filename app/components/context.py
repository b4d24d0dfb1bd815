"""The context bar: which window of time and which part of the traffic every panel of a page is about.

All of it is in the URL, so a link shows another person the same thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import streamlit as st

from app.charts.theme import Palette, palette
from app.queries import overview
from app.queries.database import settings
from engine.store.repositories.overview import Slice

RANGES = {
    "15m": timedelta(minutes=15),
    "1h": timedelta(hours=1),
    "6h": timedelta(hours=6),
    "24h": timedelta(hours=24),
    "7d": timedelta(days=7),
}
ALL = "all"


@dataclass(frozen=True, slots=True)
class Context:
    """What a page is about, and how it is drawn."""

    part: Slice
    range: str
    colours: Palette


def bar() -> Callable[[], Context]:
    """Draw the bar; gives the context of this moment, to be asked again at every refresh."""
    with st.container(horizontal=True, vertical_alignment="bottom", key="context"):
        st.segmented_control("Time range", list(RANGES), default="1h", key="range", bind="query-params", required=True)
        offered = overview.known(_slice(RANGES["7d"]))
        chosen_class = _choice("Traffic class", "class", offered["classes"])
        arm = _choice("Arm", "arm", offered["arms"])
        version = _choice("Version", "version", [f"v{n}" for n in offered["versions"]])
        st.space("stretch")
        st.toggle("Live", value=True, key="live", bind="query-params", help="Refresh every few seconds")
    name = st.session_state.get("range") or "1h"

    def now() -> Context:
        number = int(version.removeprefix("v")) if version else None
        dark = st.context.theme.type == "dark"
        return Context(_slice(RANGES[name], chosen_class, arm, number), name, palette(dark))

    return now


def live(body: Callable[[], None]) -> None:
    """Draw a part of the page, and again every few seconds while Live is on."""
    every = settings().dashboard.refresh_s if st.session_state.get("live", True) else None
    st.fragment(body, run_every=every)()


def age() -> None:
    """How old the newest data are."""
    newest = overview.newest()
    if newest is None:
        st.caption("No traffic yet")
        return
    seconds = (datetime.now(UTC) - newest).total_seconds()
    shown = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    paused = "" if st.session_state.get("live", True) else " · paused"
    st.caption(f"Newest request began {shown} ago{paused}")


def _choice(label: str, key: str, options: list[str]) -> str | None:
    chosen = st.selectbox(label, [ALL, *options], key=key, bind="query-params", width=140)
    return None if chosen == ALL else chosen


def _slice(
    length: timedelta, traffic_class: str | None = None, arm: str | None = None, version: int | None = None
) -> Slice:
    """A window that ends now, at whole seconds: queries of the same few seconds share their cache."""
    now = datetime.now(UTC).replace(microsecond=0)
    until = now - timedelta(seconds=now.second % 5) + timedelta(seconds=5)
    return Slice(until - length, until, traffic_class, arm, version)
