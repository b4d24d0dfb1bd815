"""The dashboard on a database of its own."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.components.v2 import manifest_scanner

from app.charts.figure import Figure
from engine.settings import ENV_PREFIX, environment_name
from engine.store.database import Database
from tests.app.hour import Hour


@pytest.fixture(scope="session", autouse=True)
def packages_read_once() -> Iterator[None]:
    """Each run of an AppTest asks every installed package whether it brings components of a page: two seconds."""
    once = functools.cache(manifest_scanner.scan_component_manifests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_scanner, "scan_component_manifests", once)
        yield


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
    """The environment of a dashboard on an empty database."""
    with _dashboard_on(database_url, tmp_path, monkeypatch):
        yield database_url


@pytest.fixture
def seeded(hour: Hour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """The environment of a dashboard on a database with a believable hour in it, and that database."""
    with hour.copied() as url, _dashboard_on(url, tmp_path, monkeypatch):
        db = Database(url, application="tests")
        yield db
        db.close()


@contextmanager
def _dashboard_on(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Caches of other tests are forgotten.

    Whatever else the caller's environment sets (SLIPSTREAM_HOME, say) is no setting of this dashboard.
    """
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # AppTest leaves its page there
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(environment_name("database_url"), url)
    monkeypatch.setenv(environment_name("home"), str(home))
    st.cache_resource.clear()
    st.cache_data.clear()
    yield
    from app.queries.database import database

    database().close()
    st.cache_resource.clear()
    st.cache_data.clear()
