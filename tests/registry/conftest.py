from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

NewMlflow = Callable[[Path], str]


@pytest.fixture(scope="session")
def new_mlflow(tmp_path_factory: pytest.TempPathFactory) -> NewMlflow:
    """Makes an MLflow with nothing in it and gives its URI: its schema takes seconds to migrate, so it is copied."""
    empty = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(f"sqlite:///{empty}").search_experiments(max_results=1)

    def copy(path: Path) -> str:
        with closing(sqlite3.connect(empty)) as source, closing(sqlite3.connect(path)) as target:
            source.backup(target)
        return f"sqlite:///{path}"

    return copy
