"""Processor time of a page that is drawn again, and how soon it is there, in a real Chromium.

A rerun is asked for by the key R, as a reader can; it draws the whole page, of which a live refresh is a part. Asked
for in a new step of the moving window, every query is made again ("refresh"); asked for once more, the answers are
those that are kept ("warm"): a warm rerun during which the window moved on asked anew, and does not count.

When a page is there is told three times, each from the moment that its address was asked for, in a browser with an
empty cache: the browser's own first contentful paint, which may be nothing but a frame; the first figures from the
database (a card, a cell of a table, or a chart, whatever is first), the *first paint* here; and the main panel drawn.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import psutil

from engine.bench.browser import PATIENCE_MS, fresh_page
from engine.bench.report import Figure, quantile_figure
from engine.contracts import SlipstreamError
from engine.ops.supervisor import Say

CHART, TABLE = ".js-plotly-plot .main-svg", "[data-testid=stDataFrame] canvas"
NO_ANSWER = "[data-testid=stAlert]"
"""Where a window has too few requests to explain anything, a page says so and draws no chart."""
PAGES = {
    "": CHART,
    "speculation": CHART,
    "drift": CHART,
    "explain": f"{CHART}, {NO_ANSWER}",
    "rollouts": TABLE,
    "versions": TABLE,
    "traces": TABLE,
    "system": CHART,
}
"""Path of each page, and what its main panel is made of."""
FIGURES = f".card .value, .sheet td, {CHART}, {TABLE}"
"""What shows figures from the database. Words that have figures in them do not count."""
STEPS_S = {"1h": 5.0, "30d": 60.0}
"""Windows, and in which steps they move; within one, all ask the same."""
WAITED_S = 10.0
"""Longer steps are not waited for, so over such windows nothing is refreshed."""
TRIES = 4
"""Times as many pairs of reruns as are to count."""
ASKED_S = 30.0
"""A browser may be busy drawing when the key is pressed."""
QUIET_S = 0.4
"""A rerun is over when the page says so and its server has used no processor for so long."""
RESTS = "[data-testid=stApp][data-test-script-state=notRunning]"
"""Streamlit's own word for a page that is not being drawn."""


@dataclass(frozen=True, slots=True)
class There:
    """Seconds from asking for a page to the browser's first contentful paint, its first figures, its main panel."""

    contentful_s: float
    figures_s: float
    panel_s: float


@dataclass(frozen=True, slots=True)
class Look:
    """One page over one window: seconds until it was there, and milliseconds of the dashboard's processor per rerun."""

    name: str
    there: There
    refresh_ms: Sequence[float]
    warm_ms: Sequence[float]


@dataclass(frozen=True, slots=True)
class Rerun:
    """Milliseconds of the dashboard's processor, and the step of the moving window in which it began and ended."""

    cpu_ms: float
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Tab:
    """An open page, what it has sent to its server, and when it was there."""

    page: Any
    sent: Sequence[bytes | str]
    there: There

    def close(self) -> None:
        self.page.context.close()


def look(browser: Any, address: str, server: psutil.Process, reruns: int, say: Say) -> list[Look]:
    """Every page over every window. The first visit after a start, which reads the libraries in, does not count."""
    _open(browser, f"{address}/", CHART).close()
    looks = []
    for path, panel in PAGES.items():
        for window, step_s in STEPS_S.items():
            url, name = f"{address}/{path}?range={window}&live=false", f"{path or 'overview'} {window}"
            tab = _open(browser, url, panel)
            refresh, warm = _reruns(tab, step_s, server, reruns)
            tab.close()
            again = f", refreshed {_mean(refresh):.0f} ms" if refresh else ""
            there = f"figures after {tab.there.figures_s:.2f} s, main panel {tab.there.panel_s:.2f} s"
            say(f"  {name:16} {there}; CPU warm {_mean(warm):.0f} ms{again}")
            looks.append(Look(name, tab.there, refresh, warm))
    return looks


def figures(looks: Sequence[Look], rng: np.random.Generator) -> list[Figure]:
    """The page that costs the most, by its mean, and the slowest of all pages to be there."""
    found = [look.there for look in looks]
    return [
        _dearest("page_warm_cpu_ms_max", looks, "warm_ms", rng),
        _dearest("page_refresh_cpu_ms_max", looks, "refresh_ms", rng),
        quantile_figure("first_paint_s_p95", [there.figures_s for there in found], 0.95, "s", rng),
        quantile_figure("main_panel_s_p95", [there.panel_s for there in found], 0.95, "s", rng),
        quantile_figure("first_contentful_paint_s_p95", [there.contentful_s for there in found], 0.95, "s", rng),
    ]


def warm_ms(done: Sequence[Rerun]) -> list[float]:
    """Of those that find every answer kept: the rerun before asked in the same step, which had not ended meanwhile."""
    return [
        again.cpu_ms for before, again in pairwise(done) if before.began == before.ended == again.began == again.ended
    ]


def cpu_s(process: psutil.Process) -> float:
    """User and system time; the kernel counts it in ticks of 10 ms, so single reruns are rounded and means are not."""
    used = process.cpu_times()
    return float(used.user + used.system)


def _reruns(tab: Tab, step_s: float, server: psutil.Process, reruns: int) -> tuple[list[float], list[float]]:
    """Milliseconds of processor of each (refresh, warm rerun)."""
    tab.page.wait_for_timeout(1e3)
    _until_done(tab.page, server)
    refresh, done = list[float](), list[Rerun]()
    for _ in range(TRIES * reruns):
        if step_s <= WAITED_S:
            tab.page.wait_for_timeout(1e3 * (step_s - time.time() % step_s))
        for _ in range(2):  # the first asks what the second finds
            began = time.time() // step_s
            done.append(Rerun(_rerun_ms(tab, server), began, time.time() // step_s))
        if step_s <= WAITED_S:
            refresh.append(done[-2].cpu_ms)
        if len(warm := warm_ms(done)) >= reruns:
            break
    else:
        raise SlipstreamError(
            f"{tab.page.url}: {len(warm)} of {len(done)} reruns came in one step ({step_s:.0f} s) with the last. "
            "The machine may be too busy: end what runs beside this and try again."
        )
    if broken := tab.page.get_by_test_id("stException").count():
        raise SlipstreamError(f"{tab.page.url} shows {broken} errors, so what it costs says nothing.")
    return refresh, warm


def _open(browser: Any, url: str, panel: str) -> Tab:
    """A page in a browser that has seen nothing yet, as soon as its first figures and its main panel are drawn."""
    page, sent = fresh_page(browser), list[bytes | str]()
    page.on("websocket", lambda socket: socket.on("framesent", lambda payload: sent.append(payload)))
    began = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.locator(FIGURES).first.wait_for()
    figures_s = time.perf_counter() - began
    page.locator(panel).first.wait_for()
    panel_s = time.perf_counter() - began
    contentful_ms = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    return Tab(page, sent, There(contentful_ms / 1e3, figures_s, panel_s))


def _rerun_ms(tab: Tab, server: psutil.Process) -> float:
    """Milliseconds of the dashboard's processor that drawing a page again takes."""
    before, asked = cpu_s(server), len(tab.sent)
    deadline = time.monotonic() + ASKED_S
    while len(tab.sent) == asked:  # a page that is still taking in what it was sent does not hear the key
        if time.monotonic() > deadline:
            raise SlipstreamError(
                f"{tab.page.url} was not drawn again by the key R within {ASKED_S:.0f} s. The machine may be too busy: "
                "end what runs beside this and try again."
            )
        tab.page.keyboard.press("r")
        tab.page.wait_for_timeout(250)
    return 1e3 * (_until_done(tab.page, server) - before)


def _until_done(page: Any, server: psutil.Process) -> float:
    """Wait until the page is drawn and the server rests; what that has used in all by then, seconds."""
    page.locator(RESTS).wait_for()
    used, since = cpu_s(server), time.monotonic()
    deadline = since + PATIENCE_MS / 1e3
    while time.monotonic() - since < QUIET_S:
        page.wait_for_timeout(25)
        if (now := cpu_s(server)) > used:
            used, since = now, time.monotonic()
        if time.monotonic() > deadline:
            raise SlipstreamError(
                f"The dashboard did not come to rest within {PATIENCE_MS / 1e3:.0f} s after {page.url} was drawn. "
                "Something else looks at it: close what has it open and try again."
            )
    return used


def _dearest(name: str, looks: Sequence[Look], field: str, rng: np.random.Generator) -> Figure:
    worst = np.array(max(filter(None, (getattr(look, field) for look in looks)), key=_mean), float)
    means = rng.choice(worst, (2_000, len(worst))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Figure(name, float(worst.mean()), float(low), float(high), len(worst), "ms")


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
