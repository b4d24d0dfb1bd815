"""The server is warm when it answers, and ends when it is told to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from app.server import EARLY, Announcing, early
from engine.ops.system import answers
from engine.settings import child_environment, load_settings
from tests.waiting import free_ports, until

WARM = """
import asyncio, gc, json, sys
from app.server import ready
async def look():
    async with ready(None):
        names = ("plotly.graph_objs._figure", "scipy.stats", "pandas",
                 "app.queries.overview", "app.charts.latency", "app.components.rollout")
        print(json.dumps({"read": [n in sys.modules for n in names], "frozen": gc.get_freeze_count(),
                          "looked_through": len(gc.get_objects())}))
asyncio.run(look())
"""


def test_what_pages_need_is_read_in_and_no_run_looks_through_it_again() -> None:
    """In a process of its own: what is frozen stays so."""
    asked = subprocess.run([sys.executable, "-c", WARM], capture_output=True, text=True, check=True)
    found = json.loads(asked.stdout)
    assert all(found["read"])
    assert found["frozen"] > 100_000
    assert found["looked_through"] < 5_000


def test_a_file_of_the_working_directory_stands_in_for_no_package(tmp_path: Path) -> None:
    (tmp_path / "plotly.py").write_text("raise SystemExit('this is not Plotly')")
    (port,) = free_ports(1)
    environ = child_environment(load_settings(None, [f"home={tmp_path}", f"dashboard.port={port}"], {}))
    process = subprocess.Popen([sys.executable, "-m", "app"], env=environ, cwd=tmp_path)
    try:
        until(answers(f"http://127.0.0.1:{port}/_stcore/health"), "the dashboard answers", tries=600, pause_s=0.1)
    finally:
        process.terminate()
        process.wait(20)


def test_a_page_announces_the_scripts_that_streamlit_has_and_nothing_else_does() -> None:
    found = early()
    assert len(found) == len(EARLY), "Streamlit names its scripts otherwise: EARLY must follow"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (HTMLResponse("") if scope["path"] == "/drift" else PlainTextResponse(""))(scope, receive, send)

    client = TestClient(Announcing(app, found))
    assert client.get("/drift").headers["link"] == ", ".join(
        f"<{script}>; rel=modulepreload; fetchpriority=low" for script in found
    )
    assert "link" not in client.get("/other").headers
    assert "link" not in TestClient(Announcing(app, [])).get("/drift").headers
