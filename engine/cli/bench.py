"""`slipstream bench …`: every figure the project claims, measured again; here those of the system as a whole."""

from __future__ import annotations

from typing import Annotated

import typer

from engine.cli.bench_drafting import drafting
from engine.cli.context import settings
from engine.cli.measuring import Json, Keep, Seed, say, show

bench = typer.Typer(no_args_is_help=True)
bench.add_typer(drafting)


def add(app: typer.Typer) -> None:
    app.add_typer(bench, name="bench")


@bench.callback()
def group(context: typer.Context) -> None:
    """Measure what is claimed. Each prints figures with their intervals."""
    from engine.ops.interruption import interruptible

    context.with_resource(interruptible())


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

    show(run(settings(context), tries, seed, say, click), as_json)


@bench.command()
def faults(
    context: typer.Context,
    fault: Annotated[
        list[str] | None, typer.Option(help="slow, garbage, throws or fails; repeatable; without any, all four")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Canaries with a planted fault under load: which guard takes each back, how soon, and who else is hurt."""
    from engine.bench.faults import run

    show(run(settings(context), fault or (), seed, say), as_json)


@bench.command()
def outage(
    context: typer.Context,
    seconds: Annotated[float, typer.Option(help="how long Postgres stays dead")] = 30.0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Kill Postgres under load: requests that fail, traces that are missing or doubled."""
    from engine.bench.outage import run

    show(run(settings(context), seconds, seed, say), as_json)


@bench.command()
def beside(
    context: typer.Context,
    rate: Annotated[int, typer.Option(help="traces per second, with their tokens")] = 500,
    rounds: Annotated[int, typer.Option(help="of three blocks: no load, records made, records written")] = 11,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What a stream of traces costs an engine that serves beside it, and whether one of them is lost."""
    from engine.bench.beside import run

    show(run(settings(context), rate, rounds, seed, say), as_json)


@bench.command()
def durability(
    context: typer.Context,
    kills: Annotated[int, typer.Option(help="of the writer, of Postgres and of everything, in turn")] = 20,
    rate: Annotated[int, typer.Option(help="traces per second, with their tokens")] = 500,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """SIGKILL the trace writer, Postgres and every process under load: is each acknowledged trace there, once?"""
    from engine.bench.durability import run

    show(run(kills, rate, seed, say), as_json)


@bench.command()
def store(
    context: typer.Context,
    traces: Annotated[int, typer.Option(help="how many traces over 30 days")] = 100_000,
    rate: Annotated[int, typer.Option(help="traces per second offered to the writer")] = 5_000,
    seconds: Annotated[float, typer.Option(help="for how long; 0: ingest is not measured")] = 60.0,
    keep: Keep = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Every panel query over made-up traces, the rollups' error, ingest, and how soon a trace is visible."""
    from engine.bench.store import Options, run

    show(run(settings(context), Options(traces, rate, seconds, keep, seed), say), as_json)


@bench.command()
def evidence(
    requests: Annotated[int, typer.Option(min=200_000, help="compared requests of one rollout")] = 2_000_000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What a look at a rollout costs after a tenth of its compared requests and after all of them."""
    from engine.bench.evidence import run

    show(run(requests, seed, say), as_json)


@bench.command()
def dashboard(
    context: typer.Context,
    traces: Annotated[int, typer.Option(help="how many traces over 30 days")] = 200_000,
    reruns: Annotated[int, typer.Option(help="of each page and window; 0: pages are not measured")] = 5,
    pairs: Annotated[int, typer.Option(help="pairs of blocks, with 20 open pages and without; 0 for none")] = 8,
    keep: Keep = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Pages in Chromium: processor time of a rerun, first paint, and what 20 open pages cost serving."""
    from engine.bench.dashboard import Options, run

    options = Options(traces=traces, reruns=reruns, pairs=pairs, keep=keep, seed=seed)
    show(run(settings(context), options, say), as_json)


@bench.command()
def rollouts(
    quick: Annotated[bool, typer.Option("--quick/--full", help="200 rollouts with identical arms, or 2,000")] = True,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Simulated rollouts: false rollbacks of an equal canary, requests until a worse one is found, and naive rules."""
    from engine.bench.rollouts import run

    show(run(quick, seed, say), as_json)
