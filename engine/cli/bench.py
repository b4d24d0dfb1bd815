"""`slipstream bench …`: every figure the project claims, measured again."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli.context import settings

if TYPE_CHECKING:
    from engine.bench.report import Report

bench = typer.Typer(help="Measure what is claimed. Each prints figures with their intervals.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]
Seed = Annotated[int, typer.Option(help="seed of traffic and resampling")]


def add(app: typer.Typer) -> None:
    app.add_typer(bench, name="bench")


@bench.command()
def rollback(
    context: typer.Context,
    tries: Annotated[int, typer.Option(help="rollbacks of each kind")] = 50,
    click: Annotated[bool, typer.Option("--click", help="also by a click in a real browser")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time from asking for a rollback to the last request given to the bad policy, under load."""
    from engine.bench.rollback import run

    _show(run(settings(context), tries, seed, _progress, click), as_json)


@bench.command()
def outage(
    context: typer.Context,
    seconds: Annotated[float, typer.Option(help="how long Postgres stays dead")] = 30.0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Kill Postgres under load: requests that fail, traces that are missing or doubled."""
    from engine.bench.outage import run

    _show(run(settings(context), seconds, seed, _progress), as_json)


@bench.command()
def store(
    context: typer.Context,
    traces: Annotated[int, typer.Option(help="how many traces over 30 days")] = 100_000,
    rate: Annotated[int, typer.Option(help="traces per second offered to the writer")] = 5_000,
    seconds: Annotated[float, typer.Option(help="for how long")] = 60.0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Every panel query over made-up traces, the rollups' error, ingest, and how soon a trace is visible."""
    from engine.bench.store import run

    _show(run(settings(context), traces, rate, seconds, seed, _progress), as_json)


def _progress(line: str) -> None:
    sys.stderr.write(line + "\n")


def _show(report: Report, as_json: bool) -> None:
    typer.echo(report.to_json() if as_json else report.to_text())
