"""`slipstream-check`: format, lint, types, import contracts and all tests; the one command for people and for CI.

It runs in the root of a checkout. Arguments go to pytest, e.g. `slipstream-check -m 'not slow'`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

WORKERS = min((os.cpu_count() or 1) + 1, 4)
"""One more than there are processors: two of two workers waited for processes and databases two fifths of the time."""
IN_PARALLEL = ("-n", str(WORKERS), "--dist", "loadfile", "--no-loadscope-reorder")
"""Files side by side: each worker has a Postgres of its own, and what a file sets up is set up once. The order is that
of tests/conftest.py; xdist would begin with the files of many tests, and the few long ones come last."""
STEPS = (
    ("format", [sys.executable, "-m", "ruff", "format", "--check", "."]),
    ("lint", [sys.executable, "-m", "ruff", "check", "."]),
    ("types", [sys.executable, "-m", "mypy"]),
    ("imports", [str(Path(sys.executable).with_name("lint-imports"))]),
    ("tests", [sys.executable, "-m", "pytest", *IN_PARALLEL]),
)


def main() -> None:
    if not Path("pyproject.toml").is_file() or not Path("tests").is_dir():
        sys.exit("slipstream-check: run it in the root of a checkout (no pyproject.toml or tests/ here).")
    for name, command in STEPS:
        began = time.monotonic()
        extra = sys.argv[1:] if name == "tests" else []
        print(f"── {name}: {' '.join(command[-2:] + extra)}", flush=True)
        code = subprocess.run([*command, *extra]).returncode
        if code != 0:
            sys.exit(f"slipstream-check: {name} failed after {time.monotonic() - began:.0f} s (exit code {code})")
