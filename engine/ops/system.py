"""The whole system on one machine: which processes there are, in which order they start, how they find each other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx

from engine.contracts import SlipstreamError
from engine.ops import postgres
from engine.ops.interruption import held
from engine.ops.supervisor import Component, Late, Say, Supervisor, end_group, is_running, read_state, state_file
from engine.settings import Settings, child_environment
from engine.store import migrate
from engine.store.database import sqlalchemy_url

ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # housekeeping tries again by itself, and must end when told to
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
BEHIND_PEOPLE = 5
"""Niceness of what serves: a rollback, by the controller or typed, must not wait for the very load it is to end."""
BEHIND_ALL = 19
"""Niceness of the dashboard and the learner, which give way too: they get what serving leaves, and a few per cent of a
core where engines leave nothing, so that a page comes and an attempt ends. As nice as that but no more, each of their
slices kept one of an engine's threads off its core, and the others of a pass waited for it (docs/log.md)."""
READY_S = {"mlflow": 120.0, "engine": 600.0, "dashboard": 120.0}
"""How long to look. One that ends is seen at once; for one that is only slow, `start` goes on."""


def refuse_a_second(settings: Settings) -> None:
    """SlipstreamError where this system runs already or its ports are taken. Asked before anything is started, so that
    nothing of the first one is touched."""
    home = settings.home_path
    if (running := read_state(home)) is not None:
        raise SlipstreamError(
            f"The system already runs for {home} (process {running['pid']}). `slipstream status` shows it, "
            "`slipstream down` stops it; with another SLIPSTREAM_HOME a second one can run beside it."
        )
    _check_ports(settings)


def start(settings: Settings, supervisor: Supervisor, say: Say) -> Settings:
    """Start everything; returns the settings with every address filled in.

    Nothing waits for MLflow: it is started first, because it is slow, and looked at last.
    """
    home = settings.home_path
    home.mkdir(parents=True, exist_ok=True)
    if settings.database_url is None:
        say(f"Postgres: embedded, in {postgres.data_directory(home)}")
    url = start_database(settings)
    if settings.mlflow.enabled and settings.mlflow_tracking_uri is None:
        mlflow_url = f"http://{settings.mlflow.host}:{settings.mlflow.port}"
        supervisor.start(_mlflow(settings, url, mlflow_url))
        settings = settings.model_copy(update={"mlflow_tracking_uri": mlflow_url})
    located = settings.model_copy(update={"database_url": url})
    environ = _environment(located)
    _fetch_model(located, environ, say)
    api = f"http://{settings.engine.host}:{settings.engine.port}"
    supervisor.start(engine_component(located))
    supervisor.start(dashboard_component(located))
    supervisor.start(controller_component(located))
    if settings.learner.enabled:
        supervisor.start(learner_component(located))
    supervisor.start(_part("housekeeping", environ, niceness=15))
    say(f"dashboard: http://{settings.dashboard.host}:{settings.dashboard.port}{unless_ready(supervisor, 'dashboard')}")
    supervisor.wait_ready("engine", READY_S["engine"])
    say(f"engine: {api}/v1 (OpenAI-compatible)")
    if "mlflow" in (read_state(home) or {"components": {}})["components"]:
        say(f"MLflow: {settings.mlflow_tracking_uri}{unless_ready(supervisor, 'mlflow')}")
    return located


def unless_ready(supervisor: Supervisor, name: str) -> str:
    """What to add to the address of a component that is not ready in its time: nobody's requests wait for it, so it is
    no reason to take the engine down."""
    try:
        supervisor.wait_ready(name, READY_S[name])
    except Late:
        return f" (still starting; `slipstream logs {name}` shows how far it is)"
    return ""


def _fetch_model(settings: Settings, environ: dict[str, str], say: Say) -> None:
    """Let a first start show the download and conversion of its model; later starts find it."""
    model = settings.engine.model
    if Path(model).expanduser().is_dir() or (settings.home_path / "models" / model).is_dir():
        return
    argv = [sys.executable, "-m", "engine.cli", "fetch"]
    with subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as fetching:
        assert fetching.stdout is not None
        for line in fetching.stdout:
            say(f"model: {line.strip()}")
    if fetching.returncode != 0:
        raise SlipstreamError(f"The model {model!r} could not be fetched; the lines above say why.")


def start_database(settings: Settings) -> str:
    """A running database with the newest schema; gives its URL."""
    url = postgres.database_url(settings, start_embedded=True)
    migrate.upgrade(url)
    return url


def engine_component(settings: Settings) -> Component:
    """The serving engine as a process; ``settings.database_url`` must be set."""
    api = f"http://{settings.engine.host}:{settings.engine.port}"
    return _part("engine", _environment(settings), api, answers(f"{api}/readyz"), niceness=BEHIND_PEOPLE)


def learner_component(settings: Settings) -> Component:
    """The learner as a process; ``settings.database_url`` must be set."""
    return _part("learner", _environment(settings), niceness=BEHIND_ALL, gives_way=True)


def controller_component(settings: Settings) -> Component:
    """The rollout controller as a process; ``settings.database_url`` must be set."""
    return _part("controller", _environment(settings))


def dashboard_component(settings: Settings) -> Component:
    """The control plane's pages as a process; ``settings.database_url`` must be set."""
    board = f"http://{settings.dashboard.host}:{settings.dashboard.port}"
    ready = answers(f"{board}/_stcore/health")
    return _part("dashboard", _environment(settings), board, ready, BEHIND_ALL, gives_way=True)


def watch_once(chosen: Settings, supervisor: Supervisor, say: Say) -> None:
    """Start again what has ended: a component, or the embedded Postgres itself."""
    if chosen.database_url is None and postgres.running_url(chosen.home_path) is None:
        say("Postgres has ended; starting it again")
        try:
            postgres.start(chosen.home_path)
        except SlipstreamError as error:
            say(str(error))
    supervisor.watch_once()


def stop(settings: Settings, supervisor: Supervisor) -> None:
    """End all processes, then the embedded Postgres, as one step. The data stay."""
    with held():
        try:
            supervisor.stop()
        finally:
            postgres.stop(settings.home_path)


def down(settings: Settings, say: Say, sleep: Callable[[float], None], patience_s: float = 40.0) -> bool:
    """Stop a system that runs elsewhere on this machine; False when nothing ran.

    The supervisor is asked first. Where it was killed, what it had started is ended here.
    """
    home = settings.home_path
    state = read_state(home)
    if state is None:
        return postgres.stop(home)
    supervisor = state["pid"]
    if is_running(state):
        os.kill(supervisor, 15)
        waited = 0.0
        while is_running(state) and waited < patience_s:
            sleep(0.2)
            waited += 0.2
    for name, component in state["components"].items():
        if is_running(component):
            say(f"{name} was left behind by its supervisor; ending it")
            end_group(component["pid"], grace_s=10.0)
    state_file(home).unlink(missing_ok=True)
    postgres.stop(home)
    return True


def free_ports(settings: Settings) -> Settings:
    """The same settings with every port that is taken moved to the next free one."""
    taken: set[int] = set()
    updates = {}
    for name in ("engine", "mlflow", "dashboard"):
        section = getattr(settings, name)
        port = section.port
        while port in taken or not _is_free(section.host, port):
            port += 1
        taken.add(port)
        updates[name] = section.model_copy(update={"port": port})
    return settings.model_copy(update=updates)


def _mlflow(settings: Settings, database_url: str, url: str) -> Component:
    """The tracking server: its own database beside ours, artifacts in a folder, telemetry and job runner off."""
    if settings.database_url is None:
        backend = sqlalchemy_url(postgres.mlflow_url(settings.home_path))
    else:
        # An operator's server is not ours to add databases to.
        backend = f"sqlite:///{settings.dir('mlflow') / 'mlflow.db'}"
    environ = dict(os.environ)
    environ |= {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_BACKEND_STORE_URI": backend,
    }
    environ.pop("MLFLOW_TRACKING_URI", None)
    host, port = settings.mlflow.host, settings.mlflow.port
    argv = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    argv += ["--artifacts-destination", str(settings.dir("mlflow") / "artifacts")]
    argv += ["--allowed-hosts", f"localhost:{port},127.0.0.1:{port},{host}:{port}"]
    return Component("mlflow", argv, environ, url, answers(f"{url}/health"), niceness=15, outlives=True)


def _part(
    name: str,
    environ: dict[str, str],
    url: str | None = None,
    ready: Callable[[], bool] = lambda: True,
    niceness: int = 0,
    gives_way: bool = False,
) -> Component:
    return Component(name, [sys.executable, "-m", "engine.cli", name], environ, url, ready, niceness, gives_way)


def _environment(settings: Settings) -> dict[str, str]:
    return child_environment(settings) | ENVIRONMENT


def answers(url: str) -> Callable[[], bool]:
    """A question to ask again and again: does this address answer with success?"""

    def ready() -> bool:
        try:
            return httpx.get(url, timeout=2.0).is_success
        except httpx.HTTPError:
            return False

    return ready


def _check_ports(settings: Settings) -> None:
    for name in ("engine", "mlflow", "dashboard"):
        section = getattr(settings, name)
        if section.port and not _is_free(section.host, section.port):
            raise SlipstreamError(
                f"Port {section.port} for {name} is taken. Choose another: --set {name}.port=N "
                f"(or SLIPSTREAM_{name.upper()}__PORT=N)."
            )


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
