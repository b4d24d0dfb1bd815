"""`slipstream explain`: why did performance change between two windows?"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

import typer

from engine.cli.context import database
from engine.cli.query import length, utc
from engine.contracts import SlipstreamError


def add(app: typer.Typer) -> None:
    app.command()(explain)


def explain(
    context: typer.Context,
    since: Annotated[datetime, typer.Option("--from", help="begin of the first window, UTC")],
    until: Annotated[datetime, typer.Option("--to", help="begin of the second window, UTC")],
    window: Annotated[str, typer.Option(help="length of both: 15m, 6h, 1d …")] = "1h",
    metric: Annotated[str, typer.Option(help="p50, p95, tpot, tokens_s or acceptance")] = "p95",
    traffic_class: Annotated[str | None, typer.Option("--class")] = None,
    arm: Annotated[str | None, typer.Option()] = None,
    seed: Annotated[int, typer.Option(help="seed of the resampling")] = 0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Split the change of a metric between two windows into traffic mix, load, policy and the rest."""
    import numpy as np

    from engine.diagnosis.explain import explain as explained
    from engine.store import frames
    from engine.store.repositories.overview import Slice

    wide: timedelta = length(window)
    first, second = (Slice(utc(at), utc(at) + wide, traffic_class, arm) for at in (since, until))
    if second.since < first.until:
        raise SlipstreamError("The second window begins before the first one ends: choose a later --to.")
    with database(context) as opened, opened.read() as session:
        found = explained(session, first, second, metric, np.random.default_rng(seed))
    if as_json:
        typer.echo(frames.encode([], "json", found.to_rows()).decode(), nl=False)
        return
    typer.echo(found.sentence)
    for part in (*found.parts, *([found.total] if found.total is not None else [])):
        typer.echo(f"  {part.factor:7} {part.effect:+9.3g}  ({part.low:+.3g} to {part.high:+.3g}) {found.unit}")
    for event in found.events:
        typer.echo(f"  {event.at:%b %d %H:%M:%S}  {event.kind}: {event.text}")
