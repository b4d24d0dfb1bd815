"""An operator at the dashboard: a real Chromium that presses the button."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from engine.bench.rig import Rig
from engine.contracts import ServingPlan, SlipstreamError
from engine.ops.supervisor import Say
from engine.ops.system import READY_S, dashboard_component

ARGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
VIEWPORT = {"width": 1500, "height": 1000}
PATIENCE_MS = 60_000
SETTLED_MS = 1_500
"""Between opening the confirmation and the press: the time a person takes to write a reason."""


class Operator:
    """One open Rollouts page."""

    def __init__(self, page: Any, url: str) -> None:
        self._page, self._url = page, url

    def roll_back(self, canary: ServingPlan) -> Callable[[], None]:
        """Open the confirmation on ``canary`` and write the reason; gives the press that confirms."""
        page = self._page
        page.goto(self._url)
        page.get_by_role("button", name=f"Roll back to v{canary.rollback_target}").click()
        page.get_by_placeholder("It stays in the record").fill("garbage")
        page.wait_for_timeout(SETTLED_MS)
        confirm = page.get_by_test_id("stDialog").get_by_role("button", name="Roll back", exact=True)
        confirm.wait_for()
        return lambda: confirm.click()


@contextmanager
def browser(system: Rig, say: Say) -> Iterator[Operator]:
    """The dashboard beside the rig's engine, and a Chromium that looks at it."""
    with chromium("Clicks") as started:
        say("starting the dashboard")
        address = start_dashboard(system)
        yield Operator(fresh_page(started), f"{address}/rollouts")


@contextmanager
def chromium(what: str) -> Iterator[Any]:
    """A headless Chromium under Playwright; SlipstreamError that says what is missing. ``what`` needs it, plural."""
    try:
        from playwright.sync_api import TimeoutError as Late
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise SlipstreamError(f"{what} need Playwright: `pip install -e '.[test]'`.") from None
    path = executable()
    if path is None:
        raise SlipstreamError(f"{what} need Chromium: install your distribution's chromium-headless-shell or chromium.")
    with sync_playwright() as started:
        launched = started.chromium.launch(executable_path=path, args=list(ARGS))
        try:
            yield launched
        except Late as late:
            raise SlipstreamError(
                f"{what}: the browser waited in vain. {late.message.splitlines()[0]} The machine may be too busy: end "
                "what runs beside this and try again."
            ) from late
        finally:
            launched.close()


def executable() -> str | None:
    """The Chromium of this machine; that without a window first, which spends nothing on drawing one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def fresh_page(browser: Any) -> Any:
    """A page in a browser that has seen nothing yet; close it by its context."""
    context = browser.new_context(viewport=VIEWPORT)
    context.set_default_timeout(PATIENCE_MS)
    return context.new_page()


def start_dashboard(system: Rig) -> str:
    """Start the real dashboard on the rig's database and wait until it answers; gives its address."""
    component = dashboard_component(system.settings)
    system.supervisor.start(component)
    system.supervisor.wait_ready("dashboard", READY_S["dashboard"])
    assert component.url is not None
    return component.url
