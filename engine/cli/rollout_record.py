"""The half of `slipstream rollout …` that changes nothing: files, dry runs, standing, explanations, the record."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli.context import database
from engine.contracts import TERMINAL_STATES, RolloutState, SlipstreamError
from engine.percent import percent

if TYPE_CHECKING:
    from engine.store.database import Database
    from engine.store.repositories.rollouts import DecisionRecord, Rollout

WATCH_S = 1.0
Id = Annotated[int, typer.Argument(help="number of the rollout")]


def add(rollout: typer.Typer) -> None:
    for name, command in (
        *(("preset", preset), ("validate", validate), ("dry-run", dry_run), ("status", status), ("watch", watch)),
        *(("explain", explain), ("history", history), ("replay", replay), ("record", record)),
    ):
        rollout.command(name)(command)


def preset(name: Annotated[str, typer.Argument(help="cautious, standard or fast")]) -> None:
    """Print a preset as YAML, to start a file of one's own from."""
    from engine.rollout import specs

    typer.echo(specs.preset_text(name), nl=False)


def validate(file: Annotated[Path, typer.Argument(help="YAML file of guards and steps")]) -> None:
    """Check a file; say the hash its guards would be frozen under."""
    from engine.rollout import specs

    spec = specs.read_file(file)
    typer.echo(
        f"{file} is valid: {len(spec.guards)} guards, {len(spec.steps)} steps, hash {specs.spec_hash(spec)[:12]}"
    )
    typer.echo(
        f"each statistical guard may spend {percent(spec.guard_alpha(), 3)} of false rollbacks in the trial, "
        f"{percent(spec.alpha)} together" + (", shadow included" if spec.shadow is not None else "")
    )


def dry_run(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="YAML file, or the name of a preset")],
    hours: Annotated[float, typer.Option(help="how far back the traffic reaches")] = 24.0,
    splits: Annotated[int, typer.Option(min=1, help="ways to split it into equal arms")] = 40,
) -> None:
    """Try guards on the past: equal arms made of the champion's traffic, worse ones, and every rollout that is over."""
    from engine.rollout import dry_run as dry
    from engine.rollout import specs
    from engine.rollout.rehearsal import rehearse

    spec = specs.preset(str(file)) if str(file) in specs.PRESETS else specs.read_file(file)
    with database(context) as opened:
        made = rehearse(opened, spec, opened.now() - timedelta(hours=hours), splits)
    for line in dry.report(spec, made.equal, made.found, made.incidents):
        typer.echo(line)


def status(context: typer.Context, rollout_id: Id) -> None:
    """State of one rollout. Exit code: 0 ended well, 2 not over (a draft has not begun), 1 ended otherwise."""
    with database(context) as opened:
        found, decisions = _found(opened, rollout_id, turns=1)
    typer.echo(f"rollout {found.id} ({found.name}) of v{found.canary} against v{found.champion}: {found.state}")
    typer.echo(f"{found.status.get('reason', '')}")
    for decision in decisions:
        shares = {k: "–" if v is None else percent(v) for k, v in decision.evidence.get("weights", {}).items()}
        if shares:
            typer.echo(", ".join(f"{name} {share}" for name, share in shares.items()))
    _leave(found.state)


def watch(context: typer.Context, rollout_id: Id) -> None:
    """Follow a rollout until it ends; a draft is not waited for. The exit code is that of `status`."""
    from engine.store.repositories import rollouts

    seen = 0
    with database(context) as opened:
        while True:
            with opened.read() as session:
                found = rollouts.get(session, rollout_id)  # first: what is over by now has its last decision by then
                fresh = rollouts.decisions(session, rollout_id, after=seen)
            if found is None:
                raise _unknown(rollout_id)
            for decision in fresh:
                typer.echo(_line(decision))
                seen = decision.id or seen
            if found.state is RolloutState.DRAFT:
                typer.echo(f"rollout {found.id} is a draft; begin it: slipstream rollout start --draft {found.id}")
            if found.state in TERMINAL_STATES | {RolloutState.DRAFT}:
                _leave(found.state)
                return
            time.sleep(WATCH_S)


def explain(context: typer.Context, rollout_id: Id) -> None:
    """The guard table of the newest verdict, and what each guard still needs."""
    from engine.rollout import explain as explaining
    from engine.rollout import specs
    from engine.store.repositories import correctness

    with database(context) as opened:
        found, decisions = _found(opened, rollout_id, turns=200)
        with opened.read() as session:
            evidence = correctness.mismatches(session, rollout_id)
    judged = next((d for d in reversed(decisions) if d.evidence.get("guards")), None)
    if judged is None:
        typer.echo(f"rollout {rollout_id} is {found.state}; no guard has had anything to judge yet")
        return
    began = explaining.began(judged.status_before, judged.decided_at)
    rate = explaining.per_second(judged.evidence, began, judged.decided_at)
    typer.echo(f"{judged.decided_at:%Y-%m-%d %H:%M:%S}  {judged.verdict}: {judged.reason}")
    table, per_key = explaining.results(judged.evidence), explaining.per_key(judged.evidence)
    for line in explaining.lines(specs.thaw(found.spec), table, rate, per_key):
        typer.echo(line)
    for mismatch in evidence:
        typer.echo(str(mismatch))


def history(context: typer.Context, rollout_id: Id) -> None:
    """Every decision about a rollout, oldest first."""
    with database(context) as opened:
        _, decisions = _found(opened, rollout_id, turns=10_000)
    for decision in decisions:
        typer.echo(_line(decision))


def replay(context: typer.Context, rollout_id: Id) -> None:
    """Make every decision again from its own evidence. Exit code 1 where one differs or cannot be read."""
    from engine.rollout.replay import replay as again

    with database(context) as opened:
        found, decisions = _found(opened, rollout_id, turns=1_000_000)
    made = again(found, decisions)
    for one in made.differing:
        stored, replayed = ", ".join(one.stored), ", ".join(one.replayed)
        typer.echo(f"decision {one.decision_id}: the record says {stored}; made again, {replayed}")
    typer.echo(f"{made.same} of {made.judged} decisions come out as recorded")
    if made.unreadable:
        typer.echo(f"{len(made.unreadable)} could not be read by this version of the code")
    if not made.agrees:
        raise typer.Exit(1)


def record(
    context: typer.Context,
    weeks: Annotated[int, typer.Option(help="how many weeks back")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON list on standard output")] = False,
) -> None:
    """What changing drafts cost, week by week: changes, failures, time to detect and restore, interventions."""
    from engine.store.repositories import operations

    with database(context) as opened, opened.read() as session:
        now = opened.now()
        found = operations.weeks(session, now - timedelta(weeks=weeks), now)
    if as_json:
        typer.echo(json.dumps([asdict(week) | {"week": week.week.date().isoformat()} for week in found]))
        return
    typer.echo("week        changes  failed  detect s  restore s  canary h  interventions")
    for week in found:
        seconds = ["–" if value is None else f"{value:.1f}" for value in (week.detect_s, week.restore_s)]
        typer.echo(
            f"{week.week:%Y-%m-%d}  {week.changes:7}  {week.failed:6}  {seconds[0]:>8}  {seconds[1]:>9}  "
            f"{week.canary_hours:8.2f}  {week.interventions:13}"
        )


def _found(opened: Database, rollout_id: int, turns: int) -> tuple[Rollout, list[DecisionRecord]]:
    from engine.store.repositories import rollouts

    with opened.read() as session:
        found = rollouts.get(session, rollout_id)
        if found is None:
            raise _unknown(rollout_id)
        return found, rollouts.decisions(session, rollout_id, limit=turns)


def _unknown(rollout_id: int) -> SlipstreamError:
    return SlipstreamError(f"There is no rollout {rollout_id}. `slipstream rollout list` shows them.")


def _line(decision: DecisionRecord) -> str:
    moved = f"{decision.from_state} → {decision.to_state}"
    return f"{decision.decided_at:%H:%M:%S}  {moved}  {decision.verdict}  {decision.reason}"


def _leave(state: RolloutState) -> None:
    if state is not RolloutState.DONE:
        raise typer.Exit(1 if state in TERMINAL_STATES else 2)
