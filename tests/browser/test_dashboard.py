"""The dashboard in Chromium: every page, light and dark; a deep link; the rollback; a narrow window.

Screenshots go to SCREENSHOTS, or to screenshots/ in the checkout.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import psycopg
import pytest

from engine.bench.browser import executable
from engine.ops.system import answers
from engine.settings import child_environment, load_settings
from engine.store.database import Database
from engine.store.repositories import plans, traces
from engine.store.repositories.overview import Slice
from tests.app.seed import beat, seed
from tests.databases import TEMPLATE, with_database
from tests.waiting import free_ports, until

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser
WAIT_MS = 60_000
"""How long a page may take for anything: only a failure waits so long."""
expect = playwright.expect
expect.set_options(timeout=WAIT_MS)
ARGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
WIDE, NARROW = 1500, 900
SHOTS = Path(os.environ.get("SCREENSHOTS", Path(__file__).parents[2] / "screenshots"))
PAGES = {
    "overview": "/",
    **{name: f"/{name}" for name in ("speculation", "drift", "explain", "rollouts", "versions", "traces", "system")},
}
LAST = {
    "overview": "Why did it change?",
    "speculation": "gain: time of plain decoding / time spent",
    "drift": "a slide at a constant version",
    "explain": "slowest of the traffic that moved it most",
    "system": "that were not in the cache",
    "rollouts": "Decisions on",
    "versions": "the refused ones too",
    "traces": "Choose one to open it",
    "trace": "assignment key",
}
"""A text near the end of each page: when it is there, the page is drawn."""


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    found = executable()
    if found is None:
        pytest.skip("no Chromium on this machine: install Debian's package chromium-headless-shell, or chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=found, args=ARGS)
        yield chromium
        chromium.close()


OpenPage = Callable[..., playwright.Page]


@pytest.fixture(scope="module")
def windows(browser: playwright.Browser) -> dict[str, playwright.Page]:
    """Of one who likes it light and one who likes it dark. They stay open: what is warm costs less."""
    return {scheme: browser.new_context(color_scheme=scheme).new_page() for scheme in ("light", "dark")}


@pytest.fixture
def open_page(windows: dict[str, playwright.Page]) -> Iterator[OpenPage]:
    """Opens an address of the dashboard; what a page of the last test did, it does no more."""

    def opened(address: str, scheme: str = "light", width: int = WIDE) -> playwright.Page:
        page = windows[scheme]
        page.set_default_timeout(WAIT_MS)
        page.set_viewport_size({"width": width, "height": 1000})
        page.goto(address)
        return page

    yield opened
    for page in windows.values():
        page.goto("about:blank")


@pytest.fixture(scope="module")
def shared(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Database]]:
    """A dashboard on a seeded database, and that database, for the tests that only look."""
    name = "dashboard_to_look_at"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    folder, done = tmp_path_factory.mktemp("dashboard"), threading.Event()
    db = Database(with_database(postgres_url, name), application="tests")

    def replica() -> None:
        while not done.wait(5):
            beat(db, datetime.now(UTC), folder / "spill" / "tokenizer.json")

    alive = threading.Thread(target=replica)
    with _dashboard(with_database(postgres_url, name), db, folder) as address:
        alive.start()
        yield address, db
        done.set()
        alive.join()
    db.close()


@pytest.fixture
def url(shared: tuple[str, Database]) -> str:
    return shared[0]


@contextmanager
def _dashboard(database_url: str, db: Database, folder: Path) -> Iterator[str]:
    """Seed the database and run a dashboard on it in a process of its own, started from another folder."""
    seed(db, folder / "spill")
    (port,) = free_ports(1)
    flags = [f"database_url={database_url}", f"home={folder}", f"dashboard.port={port}"]
    environ = child_environment(load_settings(None, flags, {}))
    process = subprocess.Popen([sys.executable, "-m", "app"], env=environ, cwd=folder, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        until(answers(f"{address}/_stcore/health"), f"{address} answers", tries=600, pause_s=0.1)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def settled(page: playwright.Page, name: str) -> None:
    """Drawn to its end, without an error box, fonts and charts included."""
    page.get_by_text(LAST[name]).last.wait_for()
    page.wait_for_function("document.querySelectorAll('[data-testid=stSkeleton]').length === 0")
    page.wait_for_function("document.querySelectorAll('[data-testid=stStatusWidget]').length === 0")
    charts = page.get_by_test_id("stPlotlyChart").count()
    page.wait_for_function(f"document.querySelectorAll('.js-plotly-plot .main-svg').length >= {charts}")
    page.wait_for_timeout(400)  # tables draw on a canvas, which nothing announces
    page.wait_for_function("document.fonts.status === 'loaded'")
    expect(page.get_by_test_id("stException")).to_have_count(0)


def shot(page: playwright.Page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


def scrolls_sideways(page: playwright.Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_every_page_in_light_and_dark_wide_and_narrow(open_page: OpenPage, url: str, name: str, scheme: str) -> None:
    page = open_page(url + PAGES[name], scheme)
    settled(page, name)
    shot(page, f"{name}_{scheme}")
    asked = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert any(u.startswith(url) for u in asked)
    assert [u for u in asked if not u.startswith((url, "data:", "blob:", "ws"))] == []
    if scheme == "light":
        page.set_viewport_size({"width": NARROW, "height": 1000})
        settled(page, name)
        shot(page, f"{name}_narrow")
        assert not scrolls_sideways(page)


def test_a_deep_link_opens_one_trace_with_its_tokens(open_page: OpenPage, shared: tuple[str, Database]) -> None:
    url, db = shared
    now = datetime.now(UTC)
    with db.read() as session:
        found = traces.listed(session, Slice(now - timedelta(hours=2), now), order="slowest", limit=1)[0]
    page = open_page(f"{url}/traces?trace={found['trace_id']}")
    page.get_by_text("hover a token to see its step").wait_for()
    page.locator("span[title^='step 1: ']").first.wait_for()
    settled(page, "trace")
    shot(page, "trace_light")


def test_a_row_of_the_list_opens_its_trace_and_the_way_back_is_there(open_page: OpenPage, url: str) -> None:
    page = open_page(f"{url}/traces?class=code")
    settled(page, "traces")
    documented = page.get_by_text("Rows of a download")
    expect(documented, "no page shows the documentation in its script").to_have_count(0)
    box = page.get_by_test_id("stDataFrame").bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + 22, box["y"] + 54)  # the mark of the first row; the table is one canvas
    page.get_by_text("hover a token to see its step").wait_for()
    expect(page).to_have_url(re.compile("[?&]trace="))
    page.get_by_role("button", name="All traces").click()
    page.get_by_text("Choose one to open it").wait_for()
    expect(page).not_to_have_url(re.compile("[?&]trace="))
    expect(page).to_have_url(re.compile("[?&]class=code"))


def test_a_filter_is_in_the_url_and_survives_the_link(open_page: OpenPage, url: str) -> None:
    page = open_page(f"{url}/?class=code&range=6h")
    settled(page, "overview")
    expect(page.get_by_label("classes")).to_have_value("code")
    expect(page).to_have_url(re.compile("[?&]class=code"))


AXES = """n => { const l = document.querySelectorAll('.js-plotly-plot')[n]._fullLayout;
    return [...l.xaxis.range.map(x => l.xaxis.r2l(x) / 1e3), ...l.yaxis.range] }"""
"""What a chart shows: seconds of its first and last moment, and its height (on a log axis exponents)."""


def plot(page: playwright.Page, chart: int) -> tuple[float, float, float, float]:
    """Left, top, width and height of where a chart draws, on the screen."""
    area = page.locator(".js-plotly-plot .nsewdrag").nth(chart)
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    assert box is not None
    return box["x"], box["y"], box["width"], box["height"]


def opened_traces(page: playwright.Page) -> tuple[float, float, dict[str, str]]:
    """First and last second that the traces page was asked for, and what else."""
    page.wait_for_url("**/traces?**")
    asked = dict(parse_qsl(urlsplit(page.url).query))
    since, until = (datetime.fromisoformat(asked.pop(name)).replace(tzinfo=UTC) for name in ("from", "to"))
    settled(page, "traces")
    return since.timestamp(), until.timestamp(), asked


@pytest.mark.parametrize(
    ("path", "chart", "of"), [("", 0, None), ("", 1, "e2e"), ("drift", 0, None), ("drift", 1, None)]
)
def test_a_stroke_over_a_chart_opens_the_traces_of_that_time(
    open_page: OpenPage, url: str, path: str, chart: int, of: str | None
) -> None:
    """Points, cells, bars, lines without points. The page refreshes itself meanwhile; its filter goes along."""
    page = open_page(f"{url}/{path}?class=code&range=6h")
    settled(page, path or "overview")
    left, top, width, height = plot(page, chart)
    page.mouse.move(left + 0.5 * width, top + 0.1 * height)
    page.mouse.down()
    since, until, low, high = page.evaluate(AXES, chart)
    page.mouse.move(left + 0.9 * width, top + 0.8 * height, steps=4)
    page.mouse.up()
    first, last, asked = opened_traces(page)
    assert first == pytest.approx(since + 0.5 * (until - since), abs=120)
    assert last == pytest.approx(since + 0.9 * (until - since), abs=120)
    assert asked.pop("class") == "code"
    expect(page.get_by_label("classes")).to_have_value("code")
    if of is None:
        assert not asked
    else:
        assert asked.pop("of") == of
        bounds = {"min_ms": 10 ** (low + 0.2 * (high - low)), "max_ms": 10 ** (low + 0.9 * (high - low))}
        assert {name: float(ms) for name, ms in asked.items()} == pytest.approx(bounds, rel=0.05)


def test_a_click_on_a_chart_opens_the_traces_around_it(open_page: OpenPage, url: str) -> None:
    page = open_page(f"{url}/speculation?range=6h&live=false")
    settled(page, "speculation")
    x, y, at = page.evaluate("""() => { const g = document.querySelector('.js-plotly-plot'), l = g._fullLayout;
        const box = g.getBoundingClientRect(), line = g._fullData.find(t => t.y && t.y.some(v => v > 0));
        const n = line.y.findLastIndex(v => v > 0), x = line.x[n];
        return [box.x + l.xaxis._offset + l.xaxis.d2p(x), box.y + l.yaxis._offset + l.yaxis.d2p(line.y[n]),
                l.xaxis.d2l(x) / 1e3] }""")
    page.mouse.move(x, y)
    page.mouse.click(x, y)
    first, last, asked = opened_traces(page)
    assert first < at < last <= first + 6 * 60
    assert not asked


def test_one_click_rollback_with_its_time_to_effect(
    open_page: OpenPage, database_url: str, db: Database, tmp_path: Path
) -> None:
    """The engine's part, observing the plan, is played by a thread that waits for the ledger as a replica does."""
    with _dashboard(database_url, db, tmp_path) as url:
        page = open_page(f"{url}/rollouts")
        page.get_by_role("button", name="Roll back to v3").click()
        page.get_by_placeholder("It stays in the record").fill("p99 went up")
        done = threading.Event()

        def replica() -> None:
            while not done.is_set():
                with db.read() as session:
                    plan = plans.latest(session)
                if plan is not None and plan.generation == 8:
                    beat(db, datetime.now(UTC))
                    return
                done.wait(0.05)

        thread = threading.Thread(target=replica)
        thread.start()
        try:
            page.get_by_test_id("stDialog").get_by_role("button", name="Roll back", exact=True).click()
            page.get_by_text("Rolled back: effective on 1 of 1 replicas after 0.12 s").wait_for()
            page.get_by_test_id("stDialog").wait_for(state="detached")
            shot(page, "rolled_back_light")
        finally:
            done.set()
            thread.join()
        with db.read() as session:
            newest = plans.latest(session)
        assert newest is not None
        assert (newest.generation, newest.champion, newest.arms, newest.reason) == (8, 3, (), "p99 went up")


@pytest.mark.parametrize(("scheme", "width"), [("light", NARROW), ("dark", WIDE)])
def test_a_rollout_is_made_in_a_form_that_shows_what_it_freezes(
    open_page: OpenPage, url: str, scheme: str, width: int
) -> None:
    page = open_page(f"{url}/rollouts", scheme, width)
    page.get_by_role("button", name="New rollout").click()
    form = page.get_by_test_id("stDialog")
    form.get_by_text("This is frozen at the start under").wait_for()
    steps = form.get_by_role("textbox", name="Steps, % of eligible traffic")
    steps.fill("10, 60")
    steps.press("Enter")
    form.get_by_text("at most 0.5").wait_for()
    write = form.get_by_role("button", name="Write down as a draft")
    expect(write).to_be_disabled()
    steps.fill("10, 40")
    steps.press("Enter")
    form.get_by_text("This is frozen at the start under").wait_for()
    expect(write).to_be_enabled()
    form.get_by_text("YAML").click()
    form.get_by_text("steps: [0.1, 0.4]").wait_for()
    page.wait_for_timeout(400)
    shot(page, f"new_rollout_{scheme}_{width}")
    assert not scrolls_sideways(page)
    form.get_by_role("button", name="Cancel").click()
    form.wait_for(state="detached")


def test_a_change_is_explained_by_its_planted_cause(open_page: OpenPage, shared: tuple[str, Database]) -> None:
    """In the seeded hour better policies came, with the same traffic."""
    url, db = shared
    now = datetime.now(UTC)
    with db.read() as session:
        newest = traces.listed(session, Slice(now - timedelta(hours=2), now), limit=1)[0]
    until = newest["started_at"] + timedelta(seconds=1)
    since = until - timedelta(hours=1)
    page = open_page(f"{url}/explain?metric=acceptance&from={since:%Y-%m-%dT%H:%M:%S}&to={until:%Y-%m-%dT%H:%M:%S}")
    settled(page, "explain")
    page.get_by_text("by the policy (v2 → v3)").wait_for()
    shot(page, "explained_light")
