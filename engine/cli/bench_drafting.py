"""`slipstream bench …` of drafting and learning: policies side by side, steps, adaptation, losses, ties."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.cli.context import settings
from engine.cli.measuring import Json, Seed, say, show

drafting = typer.Typer()
Prompts = Annotated[
    list[Path] | None,
    typer.Argument(help="JSONL files in Spec-Bench's shape; without any, the project's own prompts"),
]
Classes = Annotated[str, typer.Option(help="traffic classes, by commas; all there are")]


@drafting.command()
def serving(
    context: typer.Context,
    prompts: Prompts = None,
    classes: Classes = "",
    policies: Annotated[str, typer.Option(help="policies, by commas")] = "none,ngram,memory",
    artifact: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER of a policy artifact to measure too")] = None,
    draft: Annotated[
        Path | None, typer.Option(help="folder of a neural policy, for hybrid; else the one shipped")
    ] = None,
    concurrency: Annotated[str, typer.Option(help="requests at a time, by commas")] = "1,4,16",
    peer: Annotated[list[str] | None, typer.Option(help="transformers, or url=http://host:port")] = None,
    learn: Annotated[int, typer.Option(help="requests per class that memory and hybrid learn from")] = 64,
    tested: Annotated[int, typer.Option("--prompts", help="prompts per class to test on")] = 16,
    tokens: Annotated[int, typer.Option(help="output tokens at most")] = 128,
    longest: Annotated[int, typer.Option(help="longest prompt, tokens")] = 1024,
    repeats: Annotated[int, typer.Option(help="how often each block is served under every policy")] = 1,
    telemetry: Annotated[bool, typer.Option(help="also measure what telemetry costs")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="few short prompts: a look, not a measurement")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Policies side by side: tokens per second, latencies, acceptance, and ratios to plain decoding and to peers."""
    from engine.bench.serving import Options, run

    options = Options(
        files=tuple(prompts or ()),
        classes=_names(classes),
        policies=_names(policies),
        artifacts=dict(_named_folder(text) for text in artifact or ()),
        draft=draft,
        concurrency=tuple(int(n) for n in _names(concurrency)),
        peers=tuple(peer or ()),
        learn=learn,
        test=tested,
        tokens=tokens,
        longest=longest,
        repeats=repeats,
        telemetry=telemetry,
        seed=seed,
    )
    show(run(settings(context), options.quick() if quick else options, say), as_json)


@drafting.command()
def step(
    context: typer.Context,
    shapes: Annotated[
        str, typer.Option(help="models, by commas: own is the one served, others have random weights")
    ] = "own,1b,8b",
    rows: Annotated[str, typer.Option(help="sequences in a step, by commas")] = "1,4,16",
    drafted: Annotated[str, typer.Option(help="drafted tokens of each, by commas")] = "0,4,8",
    keys: Annotated[int, typer.Option(help="tokens of each sequence before the step")] = 240,
    repeats: Annotated[int, typer.Option(help="steps of each kind")] = 50,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """One verify step against the memory bandwidth that its weights need, captured and not; and swaps of weights."""
    from engine.bench.step import Options, run

    sizes = tuple(int(n) for n in _names(rows)), tuple(int(n) for n in _names(drafted))
    show(run(settings(context), Options(_names(shapes), *sizes, keys, repeats, seed), say), as_json)


@drafting.command()
def adaptation(
    context: typer.Context,
    prompts: Annotated[
        list[Path] | None, typer.Option("--prompts", help="a JSONL file in Spec-Bench's shape; repeatable")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="JSONL of prompt and response_token_ids whose memory is static")
    ] = None,
    static: Annotated[Path | None, typer.Option(help="folder of a policy artifact to take for static")] = None,
    streams: Annotated[str, typer.Option(help="streams, by commas")] = "mixed,shift,recurring,gradual,planted",
    seeds: Annotated[int, typer.Option(help="how many orders of the same requests")] = 3,
    tokens: Annotated[int, typer.Option(help="output tokens at most")] = 128,
    every: Annotated[int, typer.Option(help="requests between two candidates")] = 16,
    tune: Annotated[int, typer.Option(help="requests a candidate tunes its neural draft on; 0: left as it is")] = 0,
    tune_every: Annotated[int, typer.Option(help="candidates of which one is tuned")] = 5,
    verify: Annotated[int, typer.Option(help="requests of each class decoded for real; 0 for none")] = 8,
    limit: Annotated[int, typer.Option(help="prompts of a class at most; 0 for all")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder for JSON, CSV and a page with the curves")] = None,
    busy: Annotated[bool, typer.Option(help="price passes by CPU time; needs engine.threads=1")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Learning from live traffic against a frozen draft when the traffic shifts; what the gate prevents."""
    from engine.bench.adaptation import Options, run

    options = Options(
        prompts=tuple(prompts or ()),
        corpus=corpus,
        static=static,
        streams=_names(streams),
        seeds=seeds,
        tokens=tokens,
        every=every,
        tune=tune,
        tune_every=tune_every,
        verify=verify,
        limit=limit,
        seed=seed,
        out=out,
        busy=busy,
    )
    show(run(settings(context), options, say), as_json)


@drafting.command()
def losses(
    context: typer.Context,
    prompts: Annotated[list[Path], typer.Option("--prompts", help="JSONL of the class that is learned; repeatable")],
    static: Annotated[Path | None, typer.Option(help="folder of a neural policy; without it the shipped one")] = None,
    learn: Annotated[int, typer.Option(help="responses that are learned")] = 32,
    tested: Annotated[int, typer.Option(help="responses that judge")] = 24,
    tokens: Annotated[int, typer.Option(help="output tokens at most")] = 128,
    seeds: Annotated[int, typer.Option(help="how many draws of responses and orders")] = 3,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What each loss makes of one pass over new traffic: acceptance length on held-out responses, paired by seed."""
    from engine.bench.losses import Options, run

    options = Options(tuple(prompts), static, learn, tested, tokens, seeds, seed)
    show(run(settings(context), options, say), as_json)


@drafting.command("learning-cost")
def learning_cost(
    context: typer.Context,
    pairs: Annotated[int, typer.Option(help="pairs of blocks, with the learner at work and without")] = 10,
    requests: Annotated[int, typer.Option(help="requests of a block")] = 24,
    clients: Annotated[int, typer.Option(help="requests at a time")] = 2,
    tokens: Annotated[int, typer.Option(help="output tokens at most")] = 24,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What learning beside serving does to latencies: the same requests with and without a learner at work."""
    from engine.bench.learning_cost import Options, run

    show(run(settings(context), Options(pairs, requests, clients, tokens, seed), say), as_json)


@drafting.command()
def ties(
    context: typer.Context,
    prompts: Prompts = None,
    classes: Classes = "",
    tested: Annotated[int, typer.Option("--prompts", help="prompts per class")] = 16,
    tokens: Annotated[int, typer.Option(help="output tokens at most")] = 48,
    dtypes: Annotated[str, typer.Option(help="dtypes, by commas")] = "bfloat16,float32",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """How far passes of different shape differ in their logits: what the auditor's bound of a tie rests on."""
    from engine.bench.ties import Options, run

    options = Options(tuple(prompts or ()), _names(classes), tested, tokens, dtypes=_names(dtypes), seed=seed)
    show(run(settings(context), options, say), as_json)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _named_folder(text: str) -> tuple[str, Path]:
    name, sign, folder = text.partition("=")
    if not (name and sign and folder):
        raise typer.BadParameter(f"--artifact takes NAME=FOLDER, got {text!r}")
    return name, Path(folder)
