"""The `slipstream` command.

Commands import what they need when they run: `slipstream rollback` must not wait for torch, MLflow or SQLAlchemy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Annotated

import typer

from engine.cli import bench, drafts, explain, policies, query, rollback, rollouts, services, store, system
from engine.contracts import SlipstreamError
from engine.settings import load_settings

SPIN_COUNT = "1000"
"""How often a thread of torch's looks for its next product before it sleeps, some twenty microseconds. OpenMP's own
300,000 is for a machine with nothing else on it: where another process has the processor of one thread, the others look
for as long as that takes, keep it from running at all if they share one with it, and a pass takes seconds."""

app = typer.Typer(
    name="slipstream",
    help="Self-improving speculative decoding, under supervision.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
system.add(app)
services.add(app)
rollback.add(app)
rollouts.add(app)
policies.add(app)
drafts.add(policies.policy)
query.add(app)
explain.add(app)
store.add(app)
bench.add(app)


@app.callback()
def configure(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="TOML file; ./slipstream.toml is read where there is one")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, e.g. engine.port=8200; repeatable")
    ] = None,
) -> None:
    """Defaults < TOML file < environment (SLIPSTREAM_…) < flags."""
    context.obj = load_settings(config, set_ or ())


def yield_processors(environ: MutableMapping[str, str]) -> None:
    """Let threads that wait leave their processor to dashboard, learner and Postgres, unless OpenMP was told otherwise.
    It asks once, when torch is imported; processes begun by this one are told the same."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environ.keys():
        environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def main() -> None:
    yield_processors(os.environ)
    try:
        app()
    except SlipstreamError as error:
        sys.stderr.write(f"slipstream: {error}\n")
        sys.exit(1)
    except Exception as error:
        said = _unanswered(error)
        if said is None:
            raise
        sys.stderr.write(
            f"slipstream: The database does not answer: {said}\n"
            "Look with `slipstream status` whether it runs; SLIPSTREAM_DATABASE_URL says which one is meant.\n"
        )
        sys.exit(1)


def _unanswered(error: Exception) -> str | None:
    """What libpq said, where the error is that the database cannot be reached; None where it is another one."""
    import psycopg

    cause = getattr(error, "orig", error)  # SQLAlchemy keeps the driver's error in its own
    return str(cause).strip().splitlines()[0] if isinstance(cause, psycopg.OperationalError) else None
