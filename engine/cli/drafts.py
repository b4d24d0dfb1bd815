"""`slipstream policy train-static`: the neural draft to start from, trained offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.cli.context import database, settings


def add(policy: typer.Typer) -> None:
    policy.command("train-static")(train_static)


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

    from engine.learner import static
    from engine.model.loading import configured_target

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
