"""`slipstream engine | learner | controller | housekeeping | dashboard | migrate`: every part by itself."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

import typer

from engine.cli.context import database, settings
from engine.ops import postgres
from engine.settings import child_environment


def add(app: typer.Typer) -> None:
    for command in (engine, learner, controller, housekeeping, dashboard, migrate, fetch):
        app.command()(command)


def engine(context: typer.Context) -> None:
    """Serve the OpenAI-compatible API."""
    from engine.server.main import serve

    _log()
    chosen = settings(context)
    serve(chosen.model_copy(update={"database_url": postgres.database_url(chosen)}))


def learner(context: typer.Context) -> None:
    """Make policies from traces, gate them and register those that pass."""
    from engine.learner.learner import run

    _log()
    with database(context, "slipstream learner") as opened:
        run(settings(context), opened, _stop_on_signal())


def controller(context: typer.Context) -> None:
    """Decide on running rollouts."""
    from engine.rollout.controller import run

    _log()
    with database(context, "slipstream controller") as opened:
        run(settings(context), opened, _stop_on_signal())


def housekeeping(context: typer.Context) -> None:
    """Export traces to MLflow, mirror versions and aliases there, make and drop partitions."""
    from engine.ops.housekeeping import run

    _log()
    with database(context, "slipstream housekeeping") as opened:
        run(settings(context), opened, _stop_on_signal())


def dashboard(context: typer.Context) -> None:
    """Serve the Streamlit control plane."""
    chosen = settings(context)
    environ = child_environment(chosen.model_copy(update={"database_url": postgres.database_url(chosen)}))
    os.execve(sys.executable, [sys.executable, "-m", "app"], environ)


def migrate(context: typer.Context) -> None:
    """Bring the database to the newest schema."""
    from engine.store import migrate as migration
    from engine.store.database import without_password

    chosen = settings(context)
    url = postgres.database_url(chosen, start_embedded=True)
    migration.upgrade(url)
    typer.echo(f"The schema is up to date: {without_password(url)}")


def fetch(context: typer.Context) -> None:
    """Fetch and convert the model now, so that the first start need not."""
    from engine.model.weights import resolve_model

    chosen = settings(context)
    typer.echo(f"ready in {resolve_model(chosen.engine.model, chosen.dir('models'), typer.echo)}")


def _log() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _stop_on_signal() -> threading.Event:
    """An event that SIGTERM and Ctrl-C set.

    By a thread of its own: a handler runs within what it interrupts, and ``set`` takes the lock that ``wait`` may hold.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=stop.set).start())
    return stop
