"""`slipstream up` as a newcomer meets it, on the tiny model: all starts, a trace reaches MLflow, nothing is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from engine.ops.system import answers
from tests.tiny_model import write_tiny_model
from tests.waiting import free_ports, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def soon(condition: Callable[[], bool], what: str) -> None:
    """Six processes take their time where others want the processors too: five minutes of looking."""
    until(condition, what, tries=3_000, pause_s=0.1)


@pytest.fixture
def environ() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="slipstream-up-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        home.chmod(0o755)
        write_tiny_model(home / "tiny")
        engine, mlflow, dashboard = free_ports(3)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLIPSTREAM_", "MLFLOW_"))}
        yield kept | {
            "SLIPSTREAM_HOME": folder,
            "SLIPSTREAM_YIELDING": "false",  # to the other tests that run meanwhile, of all things
            "SLIPSTREAM_ENGINE__MODEL": str(home / "tiny"),
            "SLIPSTREAM_ENGINE__DTYPE": "float64",
            "SLIPSTREAM_ENGINE__PORT": str(engine),
            "SLIPSTREAM_MLFLOW__PORT": str(mlflow),
            "SLIPSTREAM_DASHBOARD__PORT": str(dashboard),
        }


def slipstream(environ: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engine.cli", *words], env=environ, capture_output=True, text=True, timeout=120
    )


def test_up_serves_traces_and_leaves_nothing_behind(environ: dict[str, str]) -> None:
    home = environ["SLIPSTREAM_HOME"]
    log = Path(home) / "up.log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "engine.cli", "up"], env=environ, stdout=out, stderr=out)
    try:
        soon(lambda: "everything runs" in log.read_text() or process.poll() is not None, "up")
        assert process.poll() is None, log.read_text()
        soon(lambda: json.loads(slipstream(environ, "status", "--json").stdout)["healthy"], "all is healthy")
        status = json.loads(slipstream(environ, "status", "--json").stdout)
        assert set(status["components"]) == {"mlflow", "engine", "dashboard", "controller", "learner", "housekeeping"}
        second = slipstream(environ, "up")
        assert second.returncode == 1
        assert "already runs" in second.stderr
        assert json.loads(slipstream(environ, "status", "--json").stdout)["healthy"], "the first one is untouched"

        api = status["components"]["engine"]["url"]
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 4}
        answer = httpx.post(f"{api}/v1/completions", json=body, timeout=30).raise_for_status()
        trace_id = answer.headers["x-slipstream-trace-id"].replace("-", "")
        mlflow = status["components"]["mlflow"]["url"]
        soon(lambda: _exported(mlflow, trace_id), "the trace is in MLflow")
        soon(lambda: _aliases(mlflow) >= {"champion"}, "the champion's alias is in MLflow")

        killed = status["components"]["engine"]["pid"]
        os.kill(killed, 9)
        soon(lambda: _pid(environ) not in (None, killed), "the engine is started again")
        soon(answers(f"{api}/readyz"), "and serves")
        assert "engine" in slipstream(environ, "logs", "engine", "-n", "5").stdout
    finally:
        down = slipstream(environ, "down")
        process.wait(60)
    assert down.returncode == 0, down.stderr
    assert process.returncode == 0, log.read_text()
    left = [
        p.info for p in psutil.process_iter(["pid", "cmdline", "status"]) if home in " ".join(p.info["cmdline"] or [])
    ]
    assert left == []
    assert not (Path(home) / "run" / "system.json").exists()


def _exported(mlflow: str, trace_id: str) -> bool:
    answer = httpx.get(f"{mlflow}/api/3.0/mlflow/traces/tr-{trace_id}", timeout=10)
    return answer.is_success and answer.json()["trace"]["trace_info"]["tags"]["policy_version"] == "2"


def _aliases(mlflow: str) -> set[str]:
    answer = httpx.get(
        f"{mlflow}/api/2.0/mlflow/registered-models/get", params={"name": "slipstream-draft"}, timeout=10
    )
    return {a["alias"] for a in answer.json()["registered_model"].get("aliases", [])} if answer.is_success else set()


def _pid(environ: dict[str, str]) -> int | None:
    found = json.loads(slipstream(environ, "status", "--json").stdout)["components"].get("engine")
    return found["pid"] if found and found["alive"] else None
