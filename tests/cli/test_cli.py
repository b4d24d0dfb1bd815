"""The command line: help without a system, clear errors, verbs that write what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.cli.main import app
from engine.contracts import SlipstreamError
from engine.store.database import Database
from engine.store.repositories import commands, plans, rollouts
from tests.app.seed import beat

run = CliRunner()


@pytest.fixture
def flags(database_url: str, tmp_path: Path) -> list[str]:
    return ["--set", f"database_url={database_url}", "--set", f"home={tmp_path}"]


def test_every_command_has_help() -> None:
    for command in (
        (),
        ("up",),
        ("demo",),
        ("rollback",),
        ("rollout",),
        ("policy",),
        ("bench",),
        ("bench", "rollback"),
    ):
        answer = run.invoke(app, [*command, "--help"])
        assert answer.exit_code == 0, answer.output


def test_an_error_is_one_line_on_stderr(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "engine.cli", "--set", "engine.prot=1", "status"], capture_output=True, text=True
    )
    assert answer.returncode == 1
    assert answer.stderr == "slipstream: Unknown setting engine.prot (flag). Did you mean engine.port?\n"


def test_nothing_running_is_said_and_is_not_healthy(tmp_path: Path) -> None:
    answer = run.invoke(app, ["--set", f"home={tmp_path}", "status", "--json"])
    assert answer.exit_code == 1
    assert json.loads(answer.output)["running"] is False


def test_a_verb_without_a_database_says_how_to_get_one(tmp_path: Path) -> None:
    answer = run.invoke(app, ["--set", f"home={tmp_path}", "rollback", "--reason", "x"])
    assert isinstance(answer.exception, SlipstreamError)
    assert "slipstream up" in str(answer.exception)


def test_rollback_writes_the_ledger_and_waits_for_nobody_where_nobody_is(
    flags: list[str], db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.cli.rollback.time.sleep", lambda seconds: pytest.fail("it waits"))
    with db.write() as session:
        from sqlalchemy import delete

        from engine.store.models import ReplicaRow

        session.execute(delete(ReplicaRow))
    answer = run.invoke(app, [*flags, "rollback", "--reason", "p99 went up"], catch_exceptions=False)
    assert "v3 serves all traffic" in answer.output
    with db.read() as session:
        plan = plans.latest(session)
    assert plan is not None
    assert (plan.champion, plan.arms, plan.reason) == (3, (), "p99 went up")
    again = run.invoke(app, [*flags, "rollback", "--reason", "again"], catch_exceptions=False)
    assert f"nothing to take back: v3 serves all traffic since generation {plan.generation}" in again.output


def test_rollback_to_a_version_that_is_not_there(flags: list[str], db: Database, tmp_path: Path) -> None:
    answer = run.invoke(app, [*flags, "rollback", "--reason", "x", "--to", "99"])
    assert "no policy version 99" in str(answer.exception)


def test_lineage_in_both_directions(flags: list[str], db: Database, tmp_path: Path) -> None:
    shown = json.loads(run.invoke(app, [*flags, "policy", "show", "3", "--traces"]).output)
    train = next(part for part in shown["lineage"] if part["role"] == "train")
    assert train["traces"] == len(train["trace_ids"]) > 0
    answer = run.invoke(app, [*flags, "policy", "influenced-by", train["trace_ids"][0]])
    assert "v3" in answer.output.split()


def test_status_tells_plan_and_replicas(flags: list[str], db: Database, tmp_path: Path) -> None:
    beat(db, datetime.now(UTC))
    found = json.loads(run.invoke(app, [*flags, "status", "--json"]).output)
    assert found["plan"]["champion"] == 3
    assert found["replicas"][0]["observed_generation"] == 7
    assert found["healthy"] is False  # nothing was started by `slipstream up` here


def test_rollout_verbs(flags: list[str], db: Database, tmp_path: Path) -> None:
    with db.read() as session:
        active = rollouts.active(session)
    assert active is not None
    assert f"v{active.canary} against v{active.champion}" in run.invoke(app, [*flags, "rollout", "list"]).output
    asked = run.invoke(app, [*flags, "rollout", "pause", str(active.id), "--reason", "look first"])
    assert asked.exit_code == 0, asked.output
    with db.read() as session:
        assert [c.verb for c in commands.asked(session, active.id)] == ["hold"]
    assert run.invoke(app, [*flags, "rollout", "status", str(active.id)]).exit_code == 2
    both = run.invoke(app, [*flags, "rollout", "start", "7", "--draft", "3"])
    assert (both.exit_code, "--draft begins what" in both.output) == (2, True)
    assert "no rollout 99" in str(run.invoke(app, [*flags, "rollout", "status", "99"]).exception)


def test_a_draft_is_written_down_and_begun_later(flags: list[str], db: Database, tmp_path: Path) -> None:
    with db.read() as session:
        active = rollouts.active(session)
        assert active is not None
        plan = plans.latest(session)
    assert plan is not None
    text = run.invoke(app, [*flags, "rollout", "preset", "standard"]).output
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("max_drop: 0.03", "max_drop: 0.2"))
    assert "11 guards, 3 steps" in run.invoke(app, [*flags, "rollout", "validate", str(file)]).output
    file.with_name("typo.yaml").write_text(text.replace("soak_s", "soaks"))
    wrong = run.invoke(app, [*flags, "rollout", "validate", str(file.with_name("typo.yaml"))])
    assert "Did you mean soak_s?" in str(wrong.exception)
    made = run.invoke(app, [*flags, "rollout", "create", str(active.canary), "--file", str(file)])
    assert "is a draft" in made.output, made.exception
    with db.read() as session:
        draft = rollouts.list_rollouts(session)[0]
        assert rollouts.active(session) == active
    assert (draft.state.value, draft.spec["guards"][0]["max_drop"]) == ("DRAFT", 0.2)
    early = run.invoke(app, [*flags, "rollout", "start", "--draft", str(draft.id)])
    assert "one runs at a time" in str(early.exception)
    again = run.invoke(app, [*flags, "rollout", "start", "--draft", str(active.id)])
    assert again.exit_code != 0


def test_the_record_of_a_rollout_is_told(flags: list[str], db: Database, tmp_path: Path) -> None:
    with db.read() as session:
        active = rollouts.active(session)
    assert active is not None
    told = run.invoke(app, [*flags, "rollout", "explain", str(active.id)]).output
    assert "tokens_per_step" in told
    assert "log E/limit" in told
    assert "more requests per arm" in told
    assert "RAMPING → RAMPING" in run.invoke(app, [*flags, "rollout", "history", str(active.id)]).output
    dry = run.invoke(app, [*flags, "rollout", "dry-run", "fast", "--splits", "3"])
    assert "of 3 splits" in dry.output, dry.exception
    assert "rollout 2 ended as rolled back" in dry.output


def test_a_command_loads_nothing_it_does_not_need() -> None:
    """Typed in an emergency, its start is part of the time a rollback takes."""
    code = "import engine.cli.main, sys; print({'torch', 'numpy', 'mlflow', 'pandas', 'sqlalchemy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
