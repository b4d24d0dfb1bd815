"""`slipstream policy …`: versions and the traffic that made them."""

from __future__ import annotations

import json
from typing import Annotated
from uuid import UUID

import typer

from engine.cli.context import database
from engine.contracts import SlipstreamError
from engine.store.repositories import plans, policies

policy = typer.Typer(help="Draft-policy versions and their lineage.", no_args_is_help=True)


def add(app: typer.Typer) -> None:
    app.add_typer(policy, name="policy")


@policy.command("list")
def list_(context: typer.Context) -> None:
    """All versions, newest first."""
    with database(context) as opened, opened.read() as session:
        plan = plans.latest(session)
        roles = {}
        if plan is not None:
            roles = {arm.policy_version: arm.name for arm in plan.arms if arm.name != "control"}
            roles[plan.champion] = "champion"
        for version in policies.all_versions(session):
            mlflow = f"MLflow {version.mlflow_version}" if version.mlflow_version else ""
            parent = f"from v{version.parent_version}" if version.parent_version else ""
            typer.echo(
                f"v{version.version:<4} {version.kind.value:13} K={version.num_speculative_tokens}  "
                f"{version.digest[:12]}  {roles.get(version.version, ''):9} {parent:9} {mlflow}"
            )


@policy.command("show")
def show(
    context: typer.Context, version: int, traces: Annotated[bool, typer.Option(help="list every trace id")] = False
) -> None:
    """One version as JSON: manifest and which traffic made it."""
    with database(context) as opened, opened.read() as session:
        found = policies.get(session, version)
        if found is None:
            raise SlipstreamError(f"There is no policy version {version}. `slipstream policy list` shows them.")
        parts = policies.lineage(session, version)
    answer = {
        "version": found.version,
        "digest": found.digest,
        "kind": found.kind.value,
        "parent_version": found.parent_version,
        "created_at": str(found.created_at),
        "manifest": found.manifest,
        "lineage": [
            {
                "role": part.role,
                "traces": len(part.trace_ids),
                "from": str(part.window_from),
                "to": str(part.window_to),
                "classes": dict(part.classes),
                **({"trace_ids": [str(t) for t in part.trace_ids]} if traces else {}),
            }
            for part in parts
        ],
    }
    typer.echo(json.dumps(answer, indent=1))


@policy.command("influenced-by")
def influenced_by(context: typer.Context, trace_id: UUID) -> None:
    """Which versions a trace taught."""
    with database(context) as opened, opened.read() as session:
        for version in policies.influenced_by(session, trace_id):
            typer.echo(f"v{version}")
