from __future__ import annotations

from pathlib import Path

import pytest

from engine.model.loading import Target, load_target
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder, seed=3)
    return load_target(str(folder), folder, dtype="float64", threads=1)
