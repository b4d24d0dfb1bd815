"""`slipstream store …`: upkeep of the trace store by hand."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from engine.cli.context import database, settings

store = typer.Typer(help="The trace store: rebuild what is derived from the traces.", no_args_is_help=True)


def add(app: typer.Typer) -> None:
    app.add_typer(store, name="store")


@store.command("rebuild-rollups")
def rebuild_rollups(
    context: typer.Context,
    since: Annotated[datetime | None, typer.Option("--from", formats=["%Y-%m-%d"], help="first UTC day")] = None,
    until: Annotated[datetime | None, typer.Option("--to", formats=["%Y-%m-%d"], help="last UTC day")] = None,
) -> None:
    """Make the rollups again from the raw traces, a day at a time, while traces are being written."""
    from engine.ops import upkeep

    with database(context) as opened:
        began = datetime.now(UTC)
        telemetry = settings(context).telemetry
        days = (since and since.date(), until and until.date())
        traces = upkeep.rebuild(opened, telemetry, *days, say=typer.echo)
        typer.echo(f"rebuilt from {traces:,} traces in {(datetime.now(UTC) - began).total_seconds():.1f} s")
