"""`slipstream policy …`: versions and the traffic that made them; `slipstream tenant`, `slipstream forget`."""

from __future__ import annotations

import getpass
import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from engine.cli.context import database, settings
from engine.contracts import SlipstreamError

if TYPE_CHECKING:
    from engine.store.database import ReadSession

policy = typer.Typer(help="Draft-policy versions and their lineage.", no_args_is_help=True)


def add(app: typer.Typer) -> None:
    app.add_typer(policy, name="policy")
    app.command()(tenant)
    app.command()(forget)


@policy.command("list")
def list_(context: typer.Context) -> None:
    """All versions, newest first."""
    from engine.store.repositories import plans, policies

    with database(context) as opened, opened.read() as session:
        plan = plans.latest(session)
        roles = {}
        if plan is not None:
            roles = {arm.policy_version: arm.name for arm in plan.arms if arm.name != "control"}
            roles[plan.champion] = "champion"
        for version in policies.all_versions(session):
            mlflow = f"MLflow {version.mlflow_version}" if version.mlflow_version else ""
            parent = f"from v{version.parent_version}" if version.parent_version else ""
            role = "retired" if version.retired_at else roles.get(version.version, "")
            typer.echo(
                f"v{version.version:<4} {version.kind.value:13} K={version.num_speculative_tokens}  "
                f"{version.digest[:12]}  {role:9} {parent:9} {mlflow}"
            )


@policy.command("show")
def show(
    context: typer.Context, version: int, traces: Annotated[bool, typer.Option(help="list every trace id")] = False
) -> None:
    """One version as JSON: manifest, which traffic made it, what it cost and saved."""
    with database(context) as opened, opened.read() as session:
        typer.echo(json.dumps(_shown(session, version, traces, settings(context).learner.price_per_hour), indent=1))


@policy.command("influenced-by")
def influenced_by(
    context: typer.Context,
    trace_id: Annotated[UUID | None, typer.Argument(help="a trace")] = None,
    of_tenant: Annotated[
        str | None, typer.Option("--tenant", help="all traces of a tenant, forgotten ones too")
    ] = None,
) -> None:
    """Which versions a trace, or all traces of a tenant, taught."""
    from engine.store.repositories import policies, tenants

    if (trace_id is None) == (of_tenant is None):
        raise SlipstreamError("Name a trace id or --tenant NAME, one of the two.")
    with database(context) as opened, opened.read() as session:
        if trace_id is not None:
            found = policies.influenced_by(session, trace_id)
        else:
            found = policies.influenced_by_any(session, tenants.ordinals(session, of_tenant or ""))
    for version in found:
        typer.echo(f"v{version}")


@policy.command("rebuild")
def rebuild(context: typer.Context, version: int) -> None:
    """Make a version again from the database, and put its files where they belong if they are the same bytes."""
    from engine.contracts import ProposerKind, artifact_digest
    from engine.learner.neural import HybridMaker
    from engine.learner.rebuild import rebuild as make_again
    from engine.registry.artifacts import ArtifactStore

    store = ArtifactStore(settings(context).dir("policies"))
    with database(context) as opened:
        hybrids = HybridMaker(settings(context), opened, store)
        files = make_again(opened, version, {ProposerKind.HYBRID: hybrids.rebuild})
    store.put(files)
    typer.echo(f"v{version} is the same, byte for byte: sha256 {artifact_digest(files)}")


def tenant(
    context: typer.Context,
    name: str,
    train: Annotated[bool, typer.Option("--train/--no-train", help="whether anything may learn from it")],
) -> None:
    """Allow or forbid learning from a tenant's traffic, from now on; stored traces are obeyed too."""
    from engine.store.repositories import tenants

    with database(context) as opened, opened.write() as session:
        tenants.allow_training(session, name, train, getpass.getuser(), datetime.now(UTC))
    typer.echo(f"{name}: traces {'may' if train else 'may not'} teach drafts")


def forget(
    context: typer.Context,
    of_tenant: Annotated[str, typer.Option("--tenant", help="whose traces are deleted")],
    retire: Annotated[bool, typer.Option(help="take every version they influenced out of service, for good")] = False,
) -> None:
    """Delete a tenant's traces; list, or retire, every version they influenced."""
    from engine.learner.forget import forget as forget_tenant

    with database(context) as opened:
        done = forget_tenant(opened, of_tenant, retire, getpass.getuser(), datetime.now(UTC))
    typer.echo(f"{done.traces} traces of {of_tenant} deleted")
    typer.echo(f"they influenced {_numbers(done.influenced)}")
    if retire:
        typer.echo(f"retired {_numbers(done.retired)}")
    if done.plan is not None:
        typer.echo(f"v{done.plan.champion} serves all traffic from generation {done.plan.generation} on")
    typer.echo("Copies elsewhere stay: traces that were exported to MLflow, artifacts, backups.")


def _numbers(versions: tuple[int, ...]) -> str:
    return ", ".join(f"v{version}" for version in versions) or "no version"


def _shown(session: ReadSession, number: int, traces: bool, price_per_hour: float | None) -> dict[str, Any]:
    from engine.store.repositories import adaptation, policies

    found = policies.get(session, number)
    if found is None:
        raise SlipstreamError(f"There is no policy version {number}. `slipstream policy list` shows them.")
    cost = adaptation.of_version(session, number, datetime.now(UTC))
    return {
        "version": found.version,
        "digest": found.digest,
        "kind": found.kind.value,
        "parent_version": found.parent_version,
        "created_at": str(found.created_at),
        "retired_at": str(found.retired_at) if found.retired_at else None,
        "manifest": found.manifest,
        "adaptation": asdict(cost) | cost.derived(price_per_hour) if cost is not None else None,
        "lineage": [
            {
                "role": part.role,
                "traces": part.traces,
                "from": str(part.window_from),
                "to": str(part.window_to),
                "classes": dict(part.classes),
                "tenants": policies.tenants(session, part.members),
                **({"trace_ids": [str(t) for t in policies.trace_ids(session, part.members)]} if traces else {}),
            }
            for part in policies.lineage(session, number)
        ],
    }
