"""`slipstream query PANEL`: the machine-readable twin of every panel of the dashboard."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.cli.context import database
from engine.contracts import SlipstreamError


class Format(StrEnum):
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"


def add(app: typer.Typer) -> None:
    app.command()(query)


def query(
    context: typer.Context,
    panel: Annotated[str, typer.Argument(help="which panel; without it they are listed")] = "",
    last: Annotated[str, typer.Option("--range", help="the last 15m, 6h, 7d …")] = "1h",
    since: Annotated[datetime | None, typer.Option("--from", help="instead of --range: begin, UTC")] = None,
    until: Annotated[datetime | None, typer.Option("--to", help="end, UTC; default now")] = None,
    traffic_class: Annotated[str | None, typer.Option("--class")] = None,
    arm: Annotated[str | None, typer.Option()] = None,
    version: Annotated[int | None, typer.Option()] = None,
    replica: Annotated[str | None, typer.Option()] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the same as --format json")] = False,
    form: Annotated[Format, typer.Option("--format", help="json, csv or parquet")] = Format.JSON,
    out: Annotated[Path | None, typer.Option(help="a file; default standard output")] = None,
) -> None:
    """What a panel of the dashboard shows, as JSON, CSV or Parquet."""
    from engine.store import frames
    from engine.store.panels import PANELS
    from engine.store.repositories.overview import Slice

    if not panel:
        for each in PANELS.values():
            typer.echo(f"{each.name:32} {each.title}")
        return
    if panel not in PANELS:
        raise SlipstreamError(f"There is no panel {panel!r}. `slipstream query` lists them.")
    end = utc(until) if until is not None else datetime.now(UTC)
    begin = utc(since) if since is not None else end - length(last)
    part = Slice(begin, end, traffic_class, arm, version, replica)
    with database(context) as opened, opened.read() as session:
        rows = PANELS[panel].read(session, part)
    chosen = Format.JSON if as_json else form
    data = frames.encode(rows, chosen.value, _about(panel, PANELS[panel].title, part))
    if out is not None:
        out.write_bytes(data)
        typer.echo(f"{len(rows):,} rows in {out}", err=True)
    else:
        sys.stdout.buffer.write(data)


def length(written: str) -> timedelta:
    """ "15m", "6h", "7d" → a length of time; SlipstreamError for anything else."""
    units = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}
    number, unit = written[:-1], written[-1:]
    if unit not in units or not number.isdigit() or int(number) == 0:
        raise SlipstreamError(f"A range is a number and m, h or d, for example 15m, 6h or 7d; got {written!r}.")
    return int(number) * units[unit]


def utc(at: datetime) -> datetime:
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _about(panel: str, title: str, part: Any) -> dict[str, Any]:
    filters = {"class": part.traffic_class, "arm": part.arm, "version": part.version, "replica": part.replica}
    return {"panel": panel, "title": title, "since": part.since, "until": part.until, "filters": filters}
