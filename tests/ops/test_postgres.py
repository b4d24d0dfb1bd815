"""Where the embedded server keeps its files, and that a kill does not keep it from starting again."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest

from engine.contracts import SlipstreamError
from engine.ops import postgres
from engine.ops.supervisor import is_alive
from engine.settings import load_settings


@pytest.fixture
def root_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(postgres, "ROOT_DATA", tmp_path / "var")
    monkeypatch.setattr(postgres.os, "geteuid", lambda: 0)
    return tmp_path / "var"


def private(tmp_path: Path) -> Path:
    home = tmp_path / "private" / "slipstream"
    home.mkdir(parents=True)
    home.parent.chmod(0o700)
    return home


def test_a_private_home_of_root_is_not_opened_up(tmp_path: Path, root_data: Path) -> None:
    home = private(tmp_path)
    assert postgres.data_directory(home).is_relative_to(root_data)
    assert home.parent.stat().st_mode & 0o777 == 0o700


def test_files_stay_where_they_were_begun(tmp_path: Path, root_data: Path) -> None:
    """Data would seem lost if the place followed the permissions of the day."""
    home = private(tmp_path)
    first = postgres.data_directory(home)
    first.mkdir(parents=True)
    (first / "PG_VERSION").write_text("18")
    home.parent.chmod(0o755)
    assert postgres.data_directory(home) == first


def test_an_operators_database_is_used_as_it_is() -> None:
    settings = load_settings(None, ["database_url=postgresql://db/x"], {})
    assert postgres.database_url(settings) == "postgresql://db/x"


def test_without_a_server_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SlipstreamError, match="slipstream up"):
        postgres.database_url(load_settings(None, [f"home={tmp_path}"], {}))


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="slipstream-pg-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
        postgres.stop(Path(folder))


class Recovering:
    """The library's server: its first start gives up waiting, later ones find a server that is not ready yet."""

    def __init__(self, starts: int) -> None:
        self.left = starts

    def start(self) -> None:
        self.left -= 1
        if self.left == 1:
            raise AssertionError("status is starting")
        if self.left > 1:
            raise subprocess.TimeoutExpired("pg_ctl", 10)


def test_a_long_recovery_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Recovering(5)
    monkeypatch.setattr(postgres, "RECOVERY_PAUSE_S", 0.0)
    monkeypatch.setattr(postgres, "_library", lambda: SimpleNamespace(get_server=lambda *_, **__: server))
    monkeypatch.setattr(postgres, "_servers_in", lambda _: [1])
    assert postgres._start(tmp_path) is server
    assert server.left == 0


def test_a_server_that_does_not_start_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_library", lambda: SimpleNamespace(get_server=lambda *_, **__: Recovering(5)))
    monkeypatch.setattr(postgres, "_servers_in", lambda _: [])
    with pytest.raises(subprocess.TimeoutExpired):
        postgres._start(tmp_path)


def test_a_killed_server_starts_again_with_its_data(home: Path) -> None:
    url = postgres.start(home)
    assert postgres.start(home) == url, "a second start finds the first"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS n")
    pid = postgres.postmaster_pid(home)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for _ in range(10_000):  # a kill takes effect when the process is next scheduled
        if not is_alive(pid):
            break
        os.sched_yield()
    assert postgres.running_url(home) is None
    assert postgres.start(home) == url
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT n FROM kept").fetchone() == (42,)
    assert postgres.stop(home)
    assert not postgres.stop(home)
