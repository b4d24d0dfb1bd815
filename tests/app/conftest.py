"""The dashboard on a database of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import streamlit as st

from app.charts.figure import Figure
from engine.settings import ENV_PREFIX, environment_name
from engine.store.database import Database
from tests.app.seed import seed


@pytest.fixture(autouse=True)
def figures_that_plotly_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test draws is checked by Plotly itself on its way to the browser."""
    plain = Figure.to_dict

    def checked(made: Figure) -> dict[str, Any]:
        made.checked()
        return plain(made)

    monkeypatch.setattr(Figure, "to_dict", checked)


@pytest.fixture
def dashboard(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The environment of a dashboard on an empty database; caches of other tests are forgotten.

    Whatever else the caller's environment sets (SLIPSTREAM_HOME, say) is no setting of this dashboard.
    """
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # AppTest leaves its page there
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(environment_name("database_url"), database_url)
    monkeypatch.setenv(environment_name("home"), str(tmp_path))
    st.cache_resource.clear()
    st.cache_data.clear()
    yield database_url
    from app.queries.database import database

    database().close()
    st.cache_resource.clear()
    st.cache_data.clear()


@pytest.fixture
def seeded(dashboard: str, db: Database, tmp_path: Path) -> Database:
    seed(db, tmp_path / "spill")
    return db
