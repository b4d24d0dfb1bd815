"""The context bar: which window of time and which part of the traffic every panel of a page is about.

All of it is in the URL, so a link shows another person the same thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import streamlit as st

from app.charts.theme import Palette, Window, palette
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


@dataclass(frozen=True, slots=True)
class Context:
    """What a page is about, and how it is drawn."""

    part: Slice
    range: str
    colours: Palette

    @property
    def window(self) -> Window:
        return self.part.since, self.part.until


def bar() -> Callable[[], Context]:
    """Draw the bar; gives the context of this moment, to be asked again at every refresh."""
    with st.container(horizontal=True, vertical_alignment="center", key="context", gap="small"):
        st.segmented_control(
            "Time range",
            list(RANGES),
            default="1h",
            key="range",
            bind="query-params",
            required=True,
            label_visibility="collapsed",
        )
        offered = overview.known(_slice(RANGES["7d"]))
        chosen_class = _choice("All classes", "class", offered["classes"])
        arm = _choice("All arms", "arm", offered["arms"])
        version = _choice("All versions", "version", [f"v{n}" for n in offered["versions"]])
        st.space("stretch")
        st.toggle("Live", value=True, key="live", bind="query-params")
    name = st.session_state.get("range") or "1h"

    def now() -> Context:
        number = int(version.removeprefix("v")) if version else None
        dark = st.context.theme.type == "dark"
        return Context(_slice(RANGES[name], chosen_class, arm, number), name, palette(dark))

    return now


def live(body: Callable[[], None], still: bool = False) -> None:
    """Draw a part of the page, and again every few seconds while Live is on and it need not stand ``still``."""
    every = settings().dashboard.refresh_s if st.session_state.get("live", True) and not still else None
    st.fragment(body, run_every=every)()


def headline(sentence: str) -> None:
    """The verdict first, in larger type, and beside it how old the newest data are."""
    with st.container(horizontal=True, vertical_alignment="center", key="headline"):
        st.markdown(sentence, width="stretch")
        newest = overview.newest()
        if newest is None:
            return
        seconds = (datetime.now(UTC) - newest).total_seconds()
        ago = f"{seconds:.0f} s" if seconds < 120 else _long(seconds)
        live = st.session_state.get("live", True)
        st.caption(f"Newest request {ago} ago{'' if live else ' · paused'} · times in UTC", width="content")


def heading(title: str, note: str = "") -> None:
    """The title of a panel, and in grey what its numbers are."""
    st.markdown(f"**{title}**" + (f" :gray[:small[{note}]]" if note else ""))


def _long(seconds: float) -> str:
    for unit, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def _choice(everything: str, key: str, options: list[str]) -> str | None:
    """A filter; what an opened link asks for is offered even where it has had no traffic lately."""
    asked = st.query_params.get(key)
    if asked and asked != everything and asked not in options:
        options = [*options, asked]
    label = everything.removeprefix("All ")
    chosen = st.selectbox(
        label, [everything, *options], key=key, bind="query-params", width=126, label_visibility="collapsed"
    )
    return None if chosen == everything else chosen


def _slice(
    length: timedelta, traffic_class: str | None = None, arm: str | None = None, version: int | None = None
) -> Slice:
    """A window that ends now, at whole seconds: queries of the same few seconds share their cache."""
    now = datetime.now(UTC).replace(microsecond=0)
    until = now - timedelta(seconds=now.second % 5) + timedelta(seconds=5)
    return Slice(until - length, until, traffic_class, arm, version)
