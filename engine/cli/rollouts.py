"""`slipstream rollout …`: what changes something; the rest is in rollout_record."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli import rollout_record
from engine.cli.context import actor, database, settings

if TYPE_CHECKING:
    from engine.store.database import Database
    from engine.store.repositories.rollouts import Rollout

rollout = typer.Typer(help="Try a version on a slice, and see what became of it.", no_args_is_help=True)

Preset = Annotated[str, typer.Option(help="guards and steps: cautious, standard or fast")]
File = Annotated[Path | None, typer.Option(help="guards and steps of a YAML file instead of a preset")]
Name = Annotated[str, typer.Option(help="what to call it")]
Classes = Annotated[list[str] | None, typer.Option(help="only these classes; repeatable")]


def add(app: typer.Typer) -> None:
    rollout_record.add(rollout)
    app.add_typer(rollout, name="rollout")


@rollout.command("start")
def start(
    context: typer.Context,
    version: Annotated[int | None, typer.Argument(help="the policy version to try")] = None,
    preset: Preset = "",
    file: File = None,
    name: Name = "",
    traffic_class: Classes = None,
    draft: Annotated[int | None, typer.Option(help="begin this rollout, made by `create`")] = None,
) -> None:
    """Begin a rollout of a version; the controller takes it from here."""
    from engine.rollout.launch import release

    with database(context) as opened:
        if draft is not None:
            if version is not None or preset or file is not None or name or traffic_class:
                raise typer.BadParameter(
                    "--draft begins what `create` wrote down, as it is; leave the version and the other options out"
                )
            made = release(opened, draft, actor())
        elif version is not None:
            made = _launch(context, opened, version, preset, file, name, traffic_class, draft=False)
        else:
            raise typer.BadParameter("name a policy version, or --draft ID of a rollout that `create` made")
    typer.echo(f"rollout {made.id} ({made.name}) of v{made.canary} against v{made.champion}: {made.state}")
    _say_limits(made)


@rollout.command("create")
def create(
    context: typer.Context,
    version: Annotated[int, typer.Argument(help="the policy version to try")],
    preset: Preset = "",
    file: File = None,
    name: Name = "",
    traffic_class: Classes = None,
) -> None:
    """Write a rollout down, its guards frozen, without starting it."""
    with database(context) as opened:
        made = _launch(context, opened, version, preset, file, name, traffic_class, draft=True)
    typer.echo(f"rollout {made.id} ({made.name}) of v{made.canary} is a draft, guards {made.spec_hash[:12]}")
    typer.echo(f"begin it: slipstream rollout start --draft {made.id}")
    _say_limits(made)


def _say_limits(made: Rollout) -> None:
    from engine.rollout import specs

    if limits := specs.thaw(made.spec).limits():
        typer.echo(f"tried on {', '.join(limits)} only: it ends when proved there, and v{made.champion} stays champion")


def _launch(
    context: typer.Context,
    opened: Database,
    version: int,
    preset: str,
    file: Path | None,
    name: str,
    traffic_class: list[str] | None,
    draft: bool,
) -> Rollout:
    from engine.rollout import specs
    from engine.rollout.launch import launch

    if file is not None and (preset or traffic_class):
        raise typer.BadParameter("--file says everything; leave --preset and --traffic-class out")
    return launch(
        opened,
        canary=version,
        preset=preset or settings(context).rollout.preset,
        spec=specs.read_file(file) if file is not None else None,
        name=name or f"v{version}",
        actor=actor(),
        traffic_classes=traffic_class,
        draft=draft,
    )


@rollout.command("list")
def list_(context: typer.Context) -> None:
    """All rollouts, newest first."""
    from engine.store.repositories import rollouts

    with database(context) as opened, opened.read() as session:
        for found in rollouts.list_rollouts(session):
            typer.echo(f"{found.id:4}  {found.state:13} v{found.canary} against v{found.champion}  {found.name}")


def _verb(name: str, verb: str, text: str) -> None:
    def command(
        context: typer.Context,
        rollout_id: int,
        reason: Annotated[str, typer.Option(help="why; it stays in the record")],
    ) -> None:
        from engine.store.repositories import commands

        with database(context) as opened, opened.write() as session:
            commands.ask(session, rollout_id, verb, actor(), reason, f"cli-{uuid.uuid4().hex}")
        typer.echo(f"asked the controller to {name} rollout {rollout_id}")

    rollout.command(name, help=text)(command)


_verb("pause", "hold", "Hold a rollout at its present step; its guards stay on.")
_verb("resume", "resume", "Let a held rollout go on.")
_verb("promote", "promote", "Make the canary champion now, if no guard fails.")
_verb("abort", "abort", "End a rollout and give its traffic back to the champion.")
