"""Threads that wait for their next product do not keep the processor from others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from engine.cli import main
from engine.cli.main import SPIN_COUNT, yield_processors

YIELD = "import os; from engine.cli.main import yield_processors; yield_processors(os.environ)"


@pytest.mark.parametrize(
    ("code", "told"), [(f"{YIELD}; import torch", SPIN_COUNT), (f"import torch; {YIELD}", "300000")]
)
def test_openmp_hears_it_where_torch_comes_later(code: str, told: str) -> None:
    """The other way round it is too late, so no command may import torch before."""
    unset = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environ = unset | {"OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "1"}
    said = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True).stderr
    assert f"GOMP_SPINCOUNT = '{told}'" in said


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({}, {"GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_what_an_operator_told_openmp_stays(given: dict[str, str], then: dict[str, str]) -> None:
    yield_processors(given)
    assert given == then


def test_every_command_yields(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    seen = []
    monkeypatch.setattr(main, "app", lambda: seen.append(os.environ.get("GOMP_SPINCOUNT")))
    main.main()
    assert seen == [SPIN_COUNT]
