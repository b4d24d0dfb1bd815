"""The server of the pages: Streamlit's own, with what every first page needs made ready before it is asked for."""

from __future__ import annotations

import gc
import importlib
import pkgutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import plotly.io
import plotly.tools
import streamlit as st
from sqlalchemy.orm import configure_mappers
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import app.charts
import app.components
import app.queries
from app.charts.figure import Figure
from engine.settings import load_settings

SCRIPT = Path(__file__).with_name("main.py")
SCRIPTS = Path(st.__file__).with_name("static") / "static" / "js"
"""Streamlit's own, for browsers."""
LATE = ("PIL.Image", "pyarrow.pandas_compat", "scipy.stats", "streamlit.material_icon_names")
"""What pages read in only where they use it."""
EARLY = ("Html",)
"""What the first figures of every page are drawn with. Not the library of charts: to parse its 5 MB keeps the browser
busy for a second, and where it is ready before the first figures are, they wait until it has run."""


def serve() -> None:
    """Answer until the process is told to end."""
    dashboard = load_settings().dashboard
    server = st.App(SCRIPT, lifespan=ready, middleware=[Middleware(Announcing, scripts=early())])
    server.run(config={"server.address": dashboard.host, "server.port": dashboard.port})


@asynccontextmanager
async def ready(server: st.App) -> AsyncIterator[None]:
    """Read the libraries in, which the first reader would wait for otherwise.

    Streamlit collects garbage after every run of a script. What was read in here is never garbage, and to look through
    it each time was half of what drawing a page again cost; frozen, it is passed over.
    """
    for library in LATE:
        importlib.import_module(library)
    plotly.io.to_json(plotly.tools.return_figure_from_figure_or_data(Figure(), validate_figure=True), validate=False)
    for part in (app.queries, app.charts, app.components):
        for module in pkgutil.iter_modules(part.__path__, f"{part.__name__}."):
            importlib.import_module(module.name)
    configure_mappers()  # the models', which the first query would
    gc.collect()
    gc.freeze()
    yield


def early() -> list[str]:
    """Addresses of the scripts that are announced; a release of Streamlit that names them otherwise goes without."""
    return [f"/static/js/{found.name}" for name in EARLY for found in SCRIPTS.glob(f"{name}.*.js")]


class Announcing:
    """Names ``scripts`` in the header of a page, so that browsers fetch and parse them beside what starts the page.

    Streamlit asks for them when the first element that needs them has arrived.
    """

    def __init__(self, app: ASGIApp, scripts: list[str]) -> None:
        self._app = app
        self._links = ", ".join(f"<{script}>; rel=modulepreload; fetchpriority=low" for script in scripts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def announce(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if self._links and headers.get("content-type", "").startswith("text/html"):
                    headers.append("link", self._links)
            await send(message)

        await self._app(scope, receive, announce if scope["type"] == "http" else send)
