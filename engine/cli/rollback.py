"""`slipstream rollback`: typed in an emergency, so it reads no SQLAlchemy before the bad policy is taken back."""

from __future__ import annotations

import time
import uuid
from typing import Annotated

import typer

from engine.cli.context import actor, database, settings
from engine.contracts import ServingPlan
from engine.ops import postgres
from engine.store import connection
from engine.store.repositories import plans

OBSERVED_WAIT_S = 10.0
"""How long it waits for the replicas before it says which of them are silent."""


def add(app: typer.Typer) -> None:
    app.command()(rollback)


def rollback(
    context: typer.Context,
    reason: Annotated[str, typer.Option(help="why; it stays in the ledger")],
    to: Annotated[int | None, typer.Option(help="policy version; default: the champion before the canary")] = None,
) -> None:
    """Take the canary back at once. Needs the database and nothing else."""
    with connection.transaction(postgres.database_url(settings(context)), "slipstream rollback") as ledger:
        before = plans.latest(ledger)
        plan = plans.roll_back(ledger, actor=actor(), reason=reason, to=to, idempotency_key=f"cli-{uuid.uuid4().hex}")
    if before is not None and before.generation == plan.generation:
        typer.echo(f"nothing to take back: v{plan.champion} serves all traffic since generation {plan.generation}")
    else:
        typer.echo(f"generation {plan.generation}: v{plan.champion} serves all traffic")
    _report_effect(context, plan)


def _report_effect(context: typer.Context, plan: ServingPlan) -> None:
    """Say when each replica began to route by a plan; exit code 1 where a live one does not."""
    from engine.store.repositories import replicas

    deadline = time.monotonic() + OBSERVED_WAIT_S
    with database(context) as opened:
        while True:
            with opened.read() as session:
                found = replicas.effect(session, plan)
            if not found.behind or time.monotonic() > deadline:
                break
            time.sleep(0.02)
    for name, seconds in found.seconds.items():
        typer.echo(f"{name}: effective" + (f" after {seconds:.3f} s" if seconds is not None else ""))
    for problem in found.problems:
        typer.echo(f"served without all of its policies on {problem}")
    for name in found.silent:
        typer.echo(f"{name}: not heard of; its canary traffic ends with its lease at the latest")
    for name in found.behind:
        typer.echo(f"{name}: has not observed it after {OBSERVED_WAIT_S:.0f} s")
    if not (found.seconds or found.silent or found.behind):
        typer.echo("no replica is alive; the plan takes effect when one starts")
    if found.behind:
        raise typer.Exit(1)
