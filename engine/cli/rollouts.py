"""`slipstream rollback` and `slipstream rollout …`."""

from __future__ import annotations

import getpass
import time
import uuid
from typing import Annotated

import typer

from engine.cli.context import database, settings
from engine.contracts import TERMINAL_STATES, RolloutState, ServingPlan, SlipstreamError
from engine.store.database import Database
from engine.store.repositories import plans, replicas

OBSERVED_WAIT_S = 10.0
"""How long `slipstream rollback` waits for the replicas before it says which of them are silent."""

rollout = typer.Typer(help="Try a version on a slice, and see what became of it.", no_args_is_help=True)


def add(app: typer.Typer) -> None:
    app.command()(rollback)
    app.add_typer(rollout, name="rollout")


def rollback(
    context: typer.Context,
    reason: Annotated[str, typer.Option(help="why; it stays in the ledger")],
    to: Annotated[int | None, typer.Option(help="policy version; default: the champion before the canary")] = None,
) -> None:
    """Take the canary back at once. Needs the database and nothing else."""
    with database(context) as opened:
        with opened.write() as session:
            plan = plans.roll_back(
                session, actor=_actor(), reason=reason, to=to, idempotency_key=f"cli-{uuid.uuid4().hex}"
            )
        typer.echo(f"generation {plan.generation}: v{plan.champion} serves all traffic")
        _report_effect(opened, plan)


@rollout.command("start")
def start(
    context: typer.Context,
    version: Annotated[int, typer.Argument(help="the policy version to try")],
    preset: Annotated[str, typer.Option(help="guards and steps: cautious, standard or fast")] = "",
    name: Annotated[str, typer.Option(help="what to call it")] = "",
    traffic_class: Annotated[list[str] | None, typer.Option(help="only these classes; repeatable")] = None,
) -> None:
    """Begin a rollout of a version; the controller takes it from here."""
    from engine.rollout.launch import launch

    chosen = settings(context)
    with database(context) as opened:
        made = launch(
            opened,
            canary=version,
            preset=preset or chosen.rollout.preset,
            name=name or f"v{version}",
            actor=_actor(),
            traffic_classes=traffic_class,
        )
    typer.echo(f"rollout {made.id} ({made.name}) of v{made.canary} against v{made.champion}: {made.state}")


@rollout.command("list")
def list_(context: typer.Context) -> None:
    """All rollouts, newest first."""
    from engine.store.repositories import rollouts

    with database(context) as opened, opened.read() as session:
        for found in rollouts.list_rollouts(session):
            typer.echo(f"{found.id:4}  {found.state:13} v{found.canary} against v{found.champion}  {found.name}")


@rollout.command("status")
def status(context: typer.Context, rollout_id: int) -> None:
    """State of one rollout. Exit code: 0 ended well, 2 still running, 1 ended otherwise."""
    from engine.store.repositories import rollouts

    with database(context) as opened, opened.read() as session:
        found = rollouts.get(session, rollout_id)
        if found is None:
            raise SlipstreamError(f"There is no rollout {rollout_id}. `slipstream rollout list` shows them.")
        history = rollouts.decisions(session, rollout_id)
    for decision in history:
        moved = f"{decision.from_state} → {decision.to_state}"
        typer.echo(f"{decision.decided_at:%H:%M:%S}  {moved}  {decision.verdict}  {decision.reason}")
    typer.echo(f"{found.state}")
    state = RolloutState(found.state)
    if state is RolloutState.DONE:
        return
    raise typer.Exit(1 if state in TERMINAL_STATES else 2)


def _verb(name: str, verb: str, text: str) -> None:
    def command(
        context: typer.Context,
        rollout_id: int,
        reason: Annotated[str, typer.Option(help="why; it stays in the record")],
    ) -> None:
        from engine.store.repositories import rollouts

        with database(context) as opened, opened.write() as session:
            rollouts.command(session, rollout_id, verb, _actor(), reason, f"cli-{uuid.uuid4().hex}")
        typer.echo(f"asked the controller to {name} rollout {rollout_id}")

    rollout.command(name, help=text)(command)


_verb("pause", "hold", "Hold a rollout at its present step; its guards stay on.")
_verb("resume", "resume", "Let a held rollout go on.")
_verb("promote", "promote", "Make the canary champion now, if no guard fails.")
_verb("abort", "abort", "End a rollout and give its traffic back to the champion.")


def _report_effect(opened: Database, plan: ServingPlan) -> None:
    """Say when each live replica began to route by a plan."""
    deadline = time.monotonic() + OBSERVED_WAIT_S
    while True:
        with opened.read() as session:
            live = replicas.live(session)
            seen = {o.replica_id: o for o in plans.observations(session, plan.generation)}
        behind = [
            r.replica_id for r in live if (r.observed_generation or 0) < plan.generation and r.replica_id not in seen
        ]
        if (live and not behind) or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    for name, observation in seen.items():
        seconds = (observation.observed_at - plan.created_at).total_seconds()
        without = f", but without {observation.error}" if observation.error else ""
        typer.echo(f"{name}: effective after {seconds:.3f} s{without}")
    if not live:
        typer.echo("no replica is alive; the plan takes effect when one starts")
    for name in behind:
        typer.echo(f"{name}: has not observed it after {OBSERVED_WAIT_S:.0f} s")
    if behind:
        raise typer.Exit(1)


def _actor() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        return "cli"
