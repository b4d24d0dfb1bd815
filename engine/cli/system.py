"""`slipstream up | down | status | logs | demo`: the whole system on one machine."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.cli.context import settings
from engine.contracts import SlipstreamError
from engine.ops import postgres
from engine.ops.interruption import interruptible
from engine.ops.supervisor import Supervisor, is_running, log_file, read_state
from engine.percent import percent
from engine.settings import Settings


def add(app: typer.Typer) -> None:
    for command in (up, down, status, logs, demo):
        app.command()(command)


def up(context: typer.Context) -> None:
    """Start everything and watch over it until Ctrl-C."""
    from engine.ops import system

    chosen = settings(context)
    system.refuse_a_second(chosen)
    with interruptible():
        supervisor = Supervisor(chosen.home_path, say, yielding=chosen.yielding)
        try:
            system.start(chosen, supervisor, say)
            say("everything runs; Ctrl-C stops it, the data stay")
            while True:
                system.watch_once(chosen, supervisor, say)
                time.sleep(1.0)
        except KeyboardInterrupt:
            say("stopping")
        finally:
            system.stop(chosen, supervisor)


def down(context: typer.Context) -> None:
    """Stop what `slipstream up` or `slipstream demo` started. The data stay."""
    from engine.ops import system

    if not system.down(settings(context), say, time.sleep):
        say("nothing was running")


def demo(
    context: typer.Context,
    hold: Annotated[bool, typer.Option(help="keep serving when the story has been told")] = False,
    minutes: Annotated[float, typer.Option(help="give up on a chapter of the story after so long")] = 10.0,
) -> None:
    """The whole loop in ten minutes: traffic, a learned draft, a canary, its promotion, a bad one, its rollback."""
    from engine.demo import story
    from engine.ops import system

    chosen = system.free_ports(story.settings(settings(context)))
    system.refuse_a_second(chosen)
    with interruptible():
        supervisor = Supervisor(chosen.home_path, say, yielding=chosen.yielding)
        try:
            running = system.start(chosen, supervisor, say)
            story.tell(running, chosen, supervisor, say, minutes * 60.0, hold)
        except KeyboardInterrupt:
            say("stopping")
        finally:
            system.stop(chosen, supervisor)
            say(f"everything is stopped; the data stay in {chosen.home_path}")


def status(context: typer.Context, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """What runs, what is served, how the replicas are. Exit code 1 when something that should run does not."""
    found = _status(settings(context))
    if as_json:
        typer.echo(json.dumps(found, indent=1, default=str))
    else:
        _print_status(found)
    if not found["healthy"]:
        raise typer.Exit(1)


def logs(
    context: typer.Context,
    component: Annotated[str, typer.Argument(help="engine, learner, controller, housekeeping, dashboard or mlflow")],
    lines: Annotated[int, typer.Option("-n", help="how many lines from the end")] = 50,
    follow: Annotated[bool, typer.Option("-f", help="go on printing")] = False,
) -> None:
    """The log of one component."""
    path = log_file(settings(context).home_path, component)
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.log"))) or "none yet"
        raise SlipstreamError(f"There is no log of {component!r}. There are: {known}.")
    with path.open(errors="replace") as file:
        typer.echo("".join(file.readlines()[-lines:]), nl=False)
        while follow:
            typer.echo(file.read(), nl=False)
            time.sleep(0.5)


def say(line: str) -> None:
    """One line of narration, with the time of day."""
    typer.echo(f"{datetime.now():%H:%M:%S}  {line}")


def _status(chosen: Settings) -> dict[str, Any]:
    home: Path = chosen.home_path
    state = read_state(home)
    components = {
        name: part | {"alive": is_running(part)} for name, part in (state or {"components": {}})["components"].items()
    }
    url = chosen.database_url or postgres.running_url(home)
    found: dict[str, Any] = {
        "home": str(home),
        "running": state is not None,
        "started_at": state and state["started_at"],
        "components": components,
        "database": None,
        "plan": None,
        "replicas": [],
    }
    if url is not None:
        found |= _from_database(url)
    alive = all(part["alive"] for part in components.values())
    found["healthy"] = bool(state is not None and alive and found["plan"] and found["replicas"])
    return found


def _from_database(url: str) -> dict[str, Any]:
    from engine.store.database import Database, without_password
    from engine.store.repositories import plans, replicas

    database = Database(url, pool_size=1, application="slipstream status")
    try:
        with database.read() as session:
            plan = plans.latest(session)
            alive = replicas.live(session)
    finally:
        database.close()
    return {
        "database": without_password(url),
        "plan": plan
        and {
            "generation": plan.generation,
            "champion": plan.champion,
            "arms": [{"name": a.name, "policy_version": a.policy_version, "weight": a.weight} for a in plan.arms],
            "actor": plan.actor,
            "reason": plan.reason,
            "created_at": plan.created_at,
        },
        "replicas": [
            {
                "replica_id": replica.replica_id,
                "address": replica.address,
                "observed_generation": replica.observed_generation,
                "resident": list(replica.resident),
                "stats": replica.stats,
            }
            for replica in alive
        ],
    }


def _print_status(found: dict[str, Any]) -> None:
    if not found["running"]:
        typer.echo(f"Nothing runs for {found['home']}. `slipstream up` starts it.")
    for name, part in found["components"].items():
        state = "runs" if part["alive"] else "DOWN"
        restarts = f", restarted {part['restarts']} times" if part["restarts"] else ""
        typer.echo(f"{name:13} {state}  pid {part['pid']}{restarts}  {part['url'] or ''}")
    if plan := found["plan"]:
        arms = [f"{arm['name']} v{arm['policy_version']} {percent(arm['weight'])}" for arm in plan["arms"]]
        serving = f"champion v{plan['champion']}, {', '.join(arms) or 'no canary'}"
        typer.echo(f"plan          generation {plan['generation']}: {serving}")
        typer.echo(f"              by {plan['actor']}: {plan['reason']}")
    for replica in found["replicas"]:
        typer.echo(f"replica       {replica['replica_id']} observes generation {replica['observed_generation']}")
