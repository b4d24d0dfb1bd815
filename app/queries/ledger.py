"""The ledger, rollouts, versions and replicas, as records and small frames."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pandas as pd
import streamlit as st

from app.queries.database import database
from app.queries.overview import kept
from engine.contracts import ReplicaState, ServingPlan
from engine.rollout import launch as launching
from engine.rollout.guards import RolloutSpec
from engine.store.repositories import commands, operations, plans, policies, replicas, rollouts, traces
from engine.store.repositories import decisions as history
from engine.store.repositories.commands import Command
from engine.store.repositories.overview import Slice
from engine.store.repositories.plans import Observation
from engine.store.repositories.replicas import Effect
from engine.store.repositories.rollouts import DecisionRecord, Rollout

TTL = timedelta(seconds=2)
kept_as_it_is = st.cache_resource(ttl=TTL, show_spinner=False)
"""For frozen records, which nobody changes: all sessions have the same. To copy the decisions of a rollout for each,
with all their evidence, was a third of a refresh."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What is served now: the newest plan, the champion before it, who has observed it, and the rollout at work."""

    plan: ServingPlan | None
    previous: int | None
    observations: tuple[Observation, ...]
    replicas: tuple[ReplicaState, ...]
    rollout: Rollout | None
    acknowledged: ServingPlan | None = None
    """The newest plan that every live replica routes by."""
    waiting: tuple[Command, ...] = ()
    """What was asked of the rollout and not answered yet."""

    @property
    def generation(self) -> int | None:
        """Of the newest plan. The ledger only grows, so this tells all that it says."""
        return self.plan.generation if self.plan is not None else None

    @property
    def target(self) -> int | None:
        """Where a rollback goes; None where there is nothing to go back to."""
        return self.plan.rollback_target if self.plan is not None else None

    @property
    def roles(self) -> dict[int, str]:
        """Version → what it is now: champion, canary or previous; nothing of all others."""
        if self.plan is None:
            return {}
        roles = {self.previous: "previous"} if self.previous is not None else {}
        if self.plan.canary is not None:
            roles[self.plan.canary.policy_version] = "canary"
        return roles | {self.plan.champion: "champion"}

    def role(self, version: int) -> str:
        return self.roles.get(version, "")


@kept_as_it_is
def serving() -> Serving:
    with database().read() as session:
        plan = plans.latest(session)
        live = tuple(replicas.live(session))
        active = rollouts.active(session)
        seen = min((replica.observed_generation or 0 for replica in live), default=0)
        return Serving(
            plan,
            plans.previous_champion(session, plan) if plan else None,
            tuple(plans.observations(session, plan.generation)) if plan else (),
            live,
            active,
            next((p for p in plans.history(session, limit=50) if p.generation == seen), None),
            tuple(commands.asked(session, active.id, active.status.get("last_command", 0))) if active else (),
        )


@st.cache_data(ttl=timedelta(seconds=4), show_spinner=False)
def observed(generation: int, since: datetime) -> dict[str, int]:
    """Requests per arm under one generation, of the last hour at most."""
    with database().read() as session:
        return traces.arms(session, generation, max(since, datetime.now(UTC) - timedelta(hours=1)))


@kept
def marks(part: Slice, generation: int | None) -> pd.DataFrame:
    """(at, label, canary) of the plans in a window, oldest first: the deploy markers. ``generation`` is the newest."""
    with database().read() as session:
        found = plans.history(session, part.since, part.until)
        before = {plan.generation: plan for plan in plans.history(session, until=part.until)}
    rows = [(plan.created_at, _label(plan, before.get(plan.generation - 1)), _canary(plan)) for plan in reversed(found)]
    if found and (earlier := before.get(found[-1].generation - 1)) is not None and earlier.arms:
        rows.insert(0, (earlier.created_at, "", _canary(earlier)))  # its canary still served when the window began
    return pd.DataFrame(rows, columns=["at", "label", "canary"])


@kept_as_it_is
def all_rollouts() -> list[Rollout]:
    with database().read() as session:
        return rollouts.list_rollouts(session)


@kept_as_it_is
def decisions(rollout_id: int) -> list[DecisionRecord]:
    with database().read() as session:
        return history.verdicts(session, rollout_id)


@st.cache_data(ttl=timedelta(seconds=30), show_spinner=False)
def counts(rollout_id: int, newest: int | None) -> list[dict[str, Any]]:
    """What the last decision about a rollout was made of, one entry per arm and class; ``newest`` is its id."""
    with database().read() as session:
        return history.newest_counts(session, rollout_id)


@st.cache_data(ttl=timedelta(minutes=1), show_spinner=False)
def operations_record(weeks: int = 12) -> pd.DataFrame:
    """What changing drafts cost, one row a week, newest first."""
    now = datetime.now(UTC)
    with database().read() as session:
        found = operations.weeks(session, now - timedelta(weeks=weeks), now)
    frame = pd.DataFrame([asdict(week) | {"failure_rate": week.failure_rate} for week in found])
    return frame.sort_values("week", ascending=False) if len(frame) else frame


def roll_back(to: int, reason: str, key: str) -> ServingPlan:
    """One transaction to the ledger; the same key again does nothing more.

    ``to`` is the version the reader was shown: whatever the ledger did meanwhile, no other one is served.
    """
    with database().write() as session:
        plan = plans.roll_back(session, actor="dashboard", reason=reason, to=to, idempotency_key=key)
    serving.clear()
    return plan


@st.cache_data(ttl=timedelta(seconds=5), show_spinner=False)
def candidates(champion: int, most: int = 500) -> list[int]:
    """Versions that could be tried against this champion, newest first."""
    with database().read() as session:
        found = policies.all_versions(session, most)
    return [one.version for one in found if one.retired_at is None and one.version != champion]


def launch(version: int, spec: RolloutSpec, draft: bool) -> Rollout:
    """A rollout of a version under these guards: started, or only written down."""
    made = launching.launch(database(), canary=version, actor="dashboard", spec=spec, draft=draft)
    serving.clear()
    all_rollouts.clear()
    return made


def begin(rollout_id: int) -> Rollout:
    """Start a draft, against what is champion now."""
    made = launching.release(database(), rollout_id, "dashboard")
    serving.clear()
    all_rollouts.clear()
    return made


def command(rollout_id: int, verb: str, reason: str, key: str) -> None:
    """Ask the controller for something; the same key again does nothing more."""
    with database().write() as session:
        commands.ask(session, rollout_id, verb, "dashboard", reason, key)
    decisions.clear()
    serving.clear()
    all_rollouts.clear()


def effect(generation: int) -> Effect | None:
    """How a plan took effect; never cached. None for a generation that there is not."""
    with database().read() as session:
        plan = plans.get(session, generation)
        return replicas.effect(session, plan) if plan is not None else None


def _label(plan: ServingPlan, before: ServingPlan | None) -> str:
    canary = plan.canary
    if canary is not None:
        return f"v{canary.policy_version} {canary.weight * 100:g} %"
    if before is not None and before.arms and before.champion == plan.champion:
        return f"back to v{plan.champion}"
    return f"v{plan.champion} champion"


def _canary(plan: ServingPlan) -> int | None:
    canary = plan.canary
    return canary.policy_version if canary is not None else None
