"""What the commands that measure have in common: their options, and how they speak."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from engine.bench.report import Report

Json = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]
Seed = Annotated[int, typer.Option(help="seed of traffic and resampling")]
Keep = Annotated[Path | None, typer.Option(help="folder of a database that stays, and is used again")]


def say(line: str) -> None:
    sys.stderr.write(line + "\n")


def show(report: Report, as_json: bool) -> None:
    typer.echo(report.to_json() if as_json else report.to_text())
