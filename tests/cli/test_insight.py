"""What the dashboard shows can be had on the command line, and a database that is away is said in a line."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from typer.testing import CliRunner

from engine.cli.main import app
from engine.contracts import SlipstreamError
from engine.store.database import Database, without_password
from engine.store.panels import PANELS

run = CliRunner()
AWAY = "database_url=postgresql://joe:secret@127.0.0.1:1/none"


def test_panels_explanations_and_a_rebuild_from_the_command_line(
    database_url: str, db: Database, tmp_path: Path
) -> None:
    flags = ["--set", f"database_url={database_url}", "--set", f"home={tmp_path}"]
    listed = run.invoke(app, [*flags, "query"]).output
    assert all(name in listed for name in PANELS)
    found = json.loads(run.invoke(app, [*flags, "query", "overview.versions", "--range", "6h", "--json"]).output)
    assert {row["policy_version"] for row in found["rows"]} == {2, 3, 4, 5}
    assert found["panel"] == "overview.versions"
    before = sum(row["requests"] for row in found["rows"])
    out = tmp_path / "classes.csv"
    command = ["query", "overview.classes", "--format", "csv", "--out", str(out), "--class", "code"]
    assert run.invoke(app, [*flags, *command]).exit_code == 0
    assert out.read_text().splitlines()[1].startswith("code,")
    assert f"{before:,} traces" in run.invoke(app, [*flags, "store", "rebuild-rollups"]).output
    again = json.loads(run.invoke(app, [*flags, "query", "overview.versions", "--range", "6h"]).output)
    assert sum(row["requests"] for row in again["rows"]) == before
    start = datetime.now(UTC) - timedelta(hours=2)
    windows = ["--from", f"{start:%Y-%m-%dT%H:%M:%S}", "--to", f"{start + timedelta(hours=1):%Y-%m-%dT%H:%M:%S}"]
    answer = run.invoke(app, [*flags, "explain", *windows, "--metric", "acceptance", "--json"])
    told = json.loads(answer.output)
    assert told["verdict"] == "policy"
    assert [part["factor"] for part in told["parts"]] == ["mix", "load", "policy", "rest"]
    assert any(event["kind"] == "ledger" for event in told["events"])
    assert "by the policy" in run.invoke(app, [*flags, "explain", *windows, "--metric", "acceptance"]).output


def test_an_unknown_panel_range_or_window_is_said() -> None:
    for command, said in (
        (["query", "nonsense"], "no panel"),
        (["query", "overview.totals", "--range", "soon"], "15m, 6h or 7d"),
        (["explain", "--from", "2026-03-01", "--to", "2026-03-01"], "before the first one ends"),
    ):
        answer = run.invoke(app, ["--set", AWAY, *command])
        assert isinstance(answer.exception, SlipstreamError)
        assert said in str(answer.exception)


def test_a_database_that_is_away_is_one_line_without_its_password(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engine.cli", "--set", AWAY, "query", "overview.totals"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 1
    assert answer.stderr.startswith("slipstream: The database does not answer: ")
    assert "Traceback" not in answer.stderr
    assert "secret" not in answer.stderr
    assert without_password(AWAY.partition("=")[2]) == "postgresql://joe:***@127.0.0.1:1/none"
