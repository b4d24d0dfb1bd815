"""The context bar: which window of time and which part of the traffic every panel of a page is about.

All of it is in the URL, so a link shows another person the same thing.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from urllib.parse import urlencode

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
    "30d": timedelta(days=30),
}
FIXED = "fixed"
CHART_STEP_S = 15
"""The steps of longer windows are multiples of it, so their charts move on with the numbers."""
OFFERED = 100
"""Versions that the bar offers, the newest with traffic; a link may ask for any."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a page is about, and how it is drawn."""

    part: Slice
    range: str
    colours: Palette

    @property
    def window(self) -> Window:
        return self.part.since, self.part.until

    def charted(self) -> Context:
        """The same for charts over time: its window moves on in steps of ``CHART_STEP_S`` at least.

        What 5 s more change in a chart of an hour is a twelfth of its last bin. The numbers beside it are of this
        moment.
        """
        if self.range == FIXED:
            return self
        ahead = timedelta(seconds=-self.part.until.timestamp() % CHART_STEP_S)
        return replace(self, part=replace(self.part, since=self.part.since + ahead, until=self.part.until + ahead))


def bar() -> Callable[[], Context]:
    """Draw the bar; gives the context of this moment, to be asked again at every refresh."""
    given = _given()
    with st.container(horizontal=True, vertical_alignment="center", key="context", gap="small"):
        if given is not None:
            label = f"{given[0]:%b %d, %H:%M:%S} – {given[1]:%b %d, %H:%M:%S}"
            if st.button(label, icon=":material/close:", key="fixed", help="Back to the last hours"):
                del st.query_params["from"], st.query_params["to"]
                st.rerun()
        else:
            st.segmented_control(
                "Time range",
                list(RANGES),
                default="1h",
                key="range",
                bind="query-params",
                required=True,
                label_visibility="collapsed",
            )
        offered = overview.known(window(RANGES["7d"]))
        chosen_class = _choice("All classes", "class", offered["classes"])
        arm = _choice("All arms", "arm", offered["arms"])
        newest = sorted(offered["versions"], reverse=True)[:OFFERED]
        version = _choice("All versions", "version", [f"v{n}" for n in newest])
        st.space("stretch")
        st.toggle("Live", value=True, key="live", bind="query-params", disabled=given is not None)
    name = FIXED if given is not None else st.session_state.get("range") or "1h"

    def now() -> Context:
        digits = version.removeprefix("v") if version else ""
        number = int(digits) if digits.isdecimal() else None
        dark = st.context.theme.type == "dark"
        moving = window(RANGES[name]) if given is None else Slice(*given)
        part = replace(moving, traffic_class=chosen_class, arm=arm, version=number)
        return Context(part, name, palette(dark))

    return now


def live(body: Callable[[], None], still: bool = False, slowly: bool = False) -> None:
    """Draw a part of the page, and again every few seconds while Live is on and it need not stand ``still``.

    ``slowly``: as often as charts move on, for a part that holds many elements and little that is news: what an open
    page costs is how many elements it is sent.
    """
    moves = st.session_state.get("live", True) and _given() is None and not still
    every = max(settings().dashboard.refresh_s, CHART_STEP_S if slowly else 0.0)
    st.fragment(body, run_every=every if moves else None)()


def renew(page: str, *state: object) -> None:
    """Draw all of ``page`` anew where what all its parts hang on has changed since: they are not drawn equally often,
    and must not tell of different plans, or of no traffic beside charts of it."""
    drawn, now = st.session_state.get("drawn"), (page, *state)
    st.session_state["drawn"] = now
    if drawn is not None and drawn[0] == page and drawn != now:
        st.rerun()


def headline(sentence: str) -> None:
    """The verdict first, in larger type, and beside it how old the newest data are."""
    with st.container(horizontal=True, vertical_alignment="center", key="headline"):
        st.markdown(sentence, width="stretch")
        newest = overview.newest()
        if newest is None:
            return
        live = st.session_state.get("live", True) and _given() is None
        st.caption(f"Newest request {ago(newest)}{'' if live else ' · paused'} · times in UTC", width="content")


def heading(title: str, note: str = "") -> None:
    """The title of a panel, and in grey what its numbers are."""
    st.markdown(f"**{title}**" + (f" :gray[:small[{note}]]" if note else ""))


def few(part: Slice, shown: Slice) -> str:
    """ ", the 8 with the most requests" where ``shown`` leaves versions of ``part`` out."""
    return "" if shown == part else f", the {len(shown.versions or ())} with the most requests"


def plain(words: object) -> str:
    """Words of a client or an operator, so that they are no Markdown: they must not fetch images or disguise links."""
    # Only ASCII punctuation may be escaped; before any other sign the backslash would be seen.
    return "".join("\\" + c if c in string.punctuation else c for c in " ".join(str(words).split()))


def ago(at: datetime) -> str:
    """How long ago that was, in the largest unit of which there are two: "90 s ago", "3 h ago"."""
    seconds = (datetime.now(UTC) - at).total_seconds()
    for unit, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{seconds:.0f} s ago"


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


def window(length: timedelta) -> Slice:
    """A window that ends now and moves in steps, 5 s for an hour and a minute for a day.

    Within a step every panel, page and session asks the same question, so all but the first find it in the cache. The
    end lies up to a step ahead, so that nothing new is cut off.
    """
    step = min(max(int(length.total_seconds() / 720) // 5 * 5, 5), 60)
    until = datetime.fromtimestamp((int(datetime.now(UTC).timestamp()) // step + 1) * step, UTC)
    return Slice(until - length, until)


def _given() -> tuple[datetime, datetime] | None:
    """The window that the link asks for, ?from=…&to=… in UTC; None where it asks for none, or for nonsense."""
    asked = st.query_params.get("from"), st.query_params.get("to")
    if not all(asked):
        return None
    try:
        since, until = (datetime.fromisoformat(str(text)) for text in asked)
    except ValueError:
        return None
    since, until = (at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC) for at in (since, until))
    return (since, until) if since < until else None


def link(page: str, part: Slice, **more: str) -> str:
    """The address of a page about a window and part of the traffic: "traces?from=…&to=…&class=…"."""
    return f"/{page}?" + urlencode(parameters(part) | more)


def parameters(part: Slice) -> dict[str, str]:
    """A slice as it is in the URL."""
    values = {
        "from": part.since.strftime("%Y-%m-%dT%H:%M:%S"),
        "to": part.until.strftime("%Y-%m-%dT%H:%M:%S"),
        "class": part.traffic_class,
        "arm": part.arm,
        "version": f"v{part.version}" if part.version is not None else None,
    }
    return {name: value for name, value in values.items() if value is not None}
