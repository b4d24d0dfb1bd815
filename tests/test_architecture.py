"""The arrows of the design are checked by import-linter; here a forbidden import is planted and must be caught."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINTER = Path(sys.executable).with_name("lint-imports")


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    environ = dict(os.environ) | {"PYTHONPATH": str(folder)}
    return subprocess.run([LINTER, "--no-cache"], cwd=folder, env=environ, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("engine/scheduler/planted.py", "import torch", "No torch in the control plane"),
        ("engine/server/planted.py", "import engine.rollout", "The arrows of the design"),
        ("engine/store/planted.py", "import engine.telemetry", "The arrows of the design"),
        ("engine/ops/planted.py", "import app", "The engine knows nothing of the dashboard"),
        ("app/planted.py", "import engine.server", "The dashboard reads the store"),
    ],
)
def test_a_planted_import_is_caught(tmp_path: Path, module: str, line: str, contract: str) -> None:
    for name in ("engine", "app", "migrations"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / module).write_text(line + "\n")
    answer = lint(tmp_path)
    assert answer.returncode != 0, answer.stdout
    broken = [row for row in answer.stdout.splitlines() if "BROKEN" in row]
    assert any(contract in row for row in broken), answer.stdout


def test_files_are_of_a_readable_length() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("engine", "app")
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 330
    }
    assert not long
