"""What the tests of the C sources share: faults planted in them, and rows that must not depend on their neighbours."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 17, 24, 25, 40)
"""With one tile of rows or with several, of all sizes, few that take turns or many that do not."""


def plant(module: ModuleType, right: str, wrong: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``module`` compile its source with ``wrong`` in the one place where ``right`` stands, be it in a header."""
    source, found = module.SOURCE, 0
    for path in with_headers(source):
        text = path.read_text()
        found += text.count(right)
        (folder / path.name).write_text(text.replace(right, wrong))
    assert found == 1
    monkeypatch.setattr(module, "SOURCE", folder / source.name)


LATE = "team->items = n;", "team->items = n; if (team->me) for (volatile int wait = 0; wait < 20000; wait++);"
"""A fault that changes nothing: all threads but one come late to every phase, and find it over."""


def with_headers(source: Path) -> set[Path]:
    """A source and all that it is made of."""
    included = map(source.with_name, re.findall(r'#include "(.+)"', source.read_text()))
    return {source}.union(*map(with_headers, included))


def assert_rows_stand_alone(multiply: Callable[[Tensor, Any], Tensor], panels: Any) -> None:
    """To the last bit, however many there are and whichever of them it is."""
    x = torch.randn(40, panels.inputs, generator=torch.Generator().manual_seed(2)).bfloat16()
    alone = torch.cat([multiply(row[None], panels) for row in x])
    for rows in ROWS:
        assert torch.equal(multiply(x[40 - rows :], panels), alone[40 - rows :])
