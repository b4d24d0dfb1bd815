"""`slipstream policy sample-conversations` and `train-static`: the neural draft to start from, made offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.cli.context import database, settings


def add(policy: typer.Typer) -> None:
    policy.command("sample-conversations")(sample_conversations)
    policy.command("train-static")(train_static)


def sample_conversations(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="JSONL, added to until it holds --count; `policy train-static` reads it")],
    count: Annotated[int, typer.Option(help="conversations that the file holds in the end")] = 750,
    concurrency: Annotated[int, typer.Option(help="turns written at a time; a GPU takes hundreds")] = 64,
    exclude: Annotated[
        list[Path] | None, typer.Option(help="prompts that something is measured on; none of them is kept")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the first question; each further one has the next")] = 0,
) -> None:
    """Let the model write questions and answer them: conversations to train a draft on before there is traffic."""
    from engine.demo import prompts
    from engine.learner.self_sampling import write_conversations
    from engine.model.loading import configured_target

    target = configured_target(settings(context), typer.echo)
    excluded = {turn for file in exclude or () for prompt in prompts.read(file) for turn in prompt.turns}
    for held in write_conversations(target, out, count, concurrency, seed, excluded):
        if held % 100 == 0 or held == count:
            typer.echo(f"{out}: {held} of {count} conversations")


def train_static(
    context: typer.Context,
    data: Annotated[Path, typer.Option(help="JSONL: prompt, response_token_ids or response, traffic_class")],
    out: Annotated[Path, typer.Option(help="folder for features, checkpoint and, in the end, the policy")],
    epochs: Annotated[int, typer.Option(help="passes over the conversations")] = 4,
    vocabulary: Annotated[int, typer.Option(help="tokens the draft can say")] = 8192,
    minutes: Annotated[float | None, typer.Option(help="stop after so long; the same command goes on")] = None,
    loss: Annotated[str, typer.Option(help="forward_kl, reverse_kl, lk_alpha or lk_hybrid")] = "forward_kl",
    seed: Annotated[int, typer.Option(help="order of the conversations, first weights")] = 0,
    register: Annotated[bool, typer.Option(help="make the result a policy version")] = False,
) -> None:
    """Train a neural draft on conversations that the target wrote; acceptance length on those held out.

    The conversations must not come from prompts that anything is measured on.
    """
    from dataclasses import replace

    import torch

    from engine.learner import static
    from engine.model.loading import configured_target

    torch.set_float32_matmul_precision("high")  # on CUDA the tensor cores' float32: nothing is served from this process
    target = configured_target(settings(context), typer.echo, "float32")
    options = replace(static.FROM_SCRATCH, loss=loss)
    plan = static.StaticPlan(vocabulary, epochs, seed, float("inf") if minutes is None else minutes, options)
    done = static.train_static(target, static.read_conversations(data, target), out, plan, typer.echo)
    if done is None:
        typer.echo(f"stopped after {minutes} minutes; the same command goes on from {out}")
        return
    files = static.policy_files(done, target, settings(context).learner.num_speculative_tokens)
    for name, content in files.items():
        (out / "policy").mkdir(exist_ok=True)
        (out / "policy" / name).write_bytes(content)
    size = sum(map(len, files.values())) / 1e6
    typer.echo(f"{out / 'policy'}: {size:.1f} MB, {done.conversations} conversations, {done.cpu_s:.0f} CPU seconds")
    for name, counts in done.held_out.items():
        typer.echo(f"held out, {name}: acceptance length {counts}")
    if register:
        _register(context, files)


def _register(context: typer.Context, files: dict[str, bytes]) -> None:
    from engine.registry.artifacts import ArtifactStore
    from engine.registry.publish import publish

    with database(context) as opened:
        made = publish(
            opened, ArtifactStore(settings(context).dir("policies")), files, note="trained offline, not gated"
        )
    typer.echo(f"v{made.version} ({made.kind}); `slipstream rollout start {made.version}` tries it on a slice")
