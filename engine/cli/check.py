"""`slipstream-check`: format, lint, import contracts, types and all tests; the one command for people and for CI.

It runs in the root of a checkout. Arguments go to pytest, e.g. `slipstream-check -m 'not slow'`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

WORKERS = min((os.cpu_count() or 1) + 1, 4)
"""One more than there are processors: two of two workers waited for processes and databases two fifths of the time."""
IN_PARALLEL = ("-n", str(WORKERS), "--dist", "loadfile", "--no-loadscope-reorder")
"""Files side by side: each worker has a Postgres of its own, and what a file sets up is set up once. The order is that
of tests/conftest.py; xdist would begin with the files of many tests, and the few long ones come last."""
FIRST = (
    ("format", [sys.executable, "-m", "ruff", "format", "--check", "."]),
    ("lint", [sys.executable, "-m", "ruff", "check", "."]),
    ("imports", [str(Path(sys.executable).with_name("lint-imports"))]),
)
TYPES = [sys.executable, "-m", "mypy"]
TESTS = [sys.executable, "-m", "pytest", *IN_PARALLEL]
YIELDING = 10
THREADS = ("OMP_NUM_THREADS", "1")
"""Tests are parallel already. A second thread of torch's spins while it waits for a first that another process keeps
off its processor: a pass on real weights took six times as much of both."""
UNCACHED = "PYTHONDONTWRITEBYTECODE"
"""Container images set it. Here some hundred processes import the same libraries, and each would compile them anew."""


def main() -> None:
    if not Path("pyproject.toml").is_file() or not Path("tests").is_dir():
        sys.exit("slipstream-check: run it in the root of a checkout (no pyproject.toml or tests/ here).")
    os.environ.setdefault(*THREADS)
    os.environ.pop(UNCACHED, None)
    for name, command in FIRST:
        print(f"── {name}: {' '.join(command[-2:])}", flush=True)
        if code := subprocess.run(command).returncode:
            sys.exit(f"slipstream-check: {name} failed (exit code {code})")
    types_beside_tests(TYPES, [*TESTS, *sys.argv[1:]])


def types_beside_tests(types: Sequence[str], tests: Sequence[str]) -> None:
    """Run both at once: without a cache, types keep one processor for a minute. Tests come first where both want it.

    Raises:
        SystemExit: one of them failed. Types that are right say nothing, so the tests' summary is the last line.
    """
    print(f"── types, and beside them tests: {' '.join(tests)}", flush=True)
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(types, stdout=said, stderr=said) as checked:
        psutil.Process(checked.pid).nice(YIELDING)
        failed = subprocess.run(tests).returncode
        if checked.wait():
            said.seek(0)
            sys.exit(f"{said.read()}slipstream-check: types failed (exit code {checked.returncode})")
    if failed:
        sys.exit(f"slipstream-check: tests failed (exit code {failed})")
