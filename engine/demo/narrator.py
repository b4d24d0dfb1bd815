"""What has happened since the last look, in plain lines: new plans, attempts to learn, turns of a rollout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.contracts import ServingPlan
from engine.percent import percent
from engine.store.database import ReadSession
from engine.store.repositories import learning, plans, rollouts
from engine.store.repositories.rollouts import DecisionRecord


@dataclass(slots=True)
class Narrator:
    """Remembers how far it has told each record."""

    generation: int
    attempt: int
    decision: int

    @classmethod
    def from_now(cls, session: ReadSession) -> Narrator:
        """One that tells nothing of what has happened before."""
        plan, attempts = plans.latest(session), learning.attempts(session, limit=1)
        return cls(
            plan.generation if plan is not None else 0,
            (attempts[0].id or 0) if attempts else 0,
            rollouts.newest_decision(session),
        )

    def lines(self, session: ReadSession) -> Iterator[str]:
        """Oldest first within each record."""
        for attempt in reversed(learning.attempts(session, limit=20)):
            if attempt.id is not None and attempt.id > self.attempt:
                self.attempt = attempt.id
                made = f"v{attempt.version} " if attempt.version is not None else ""
                yield (
                    f"learner: {made}{attempt.outcome} after {attempt.train_traces} traces taught and "
                    f"{attempt.gate_traces} judged it: {attempt.reason}"
                )
        for rollout in reversed(rollouts.list_rollouts(session, limit=5)):
            for decision in rollouts.decisions(session, rollout.id, after=self.decision):
                self.decision = decision.id or self.decision
                if decision.from_state is not decision.to_state:
                    yield _turn(rollout.canary, decision)
        for plan in reversed(plans.history(session, limit=20)):
            if plan.generation > self.generation:
                self.generation = plan.generation
                yield _plan(plan)


def _turn(canary: int, decision: DecisionRecord) -> str:
    moved = f"{decision.from_state.value} → {decision.to_state.value}"
    return f"rollout {decision.rollout_id} of v{canary}: {moved}, {decision.verdict.value}: {decision.reason}"


def _plan(plan: ServingPlan) -> str:
    canary = plan.canary
    slice_ = f", canary v{canary.policy_version} and its control on {percent(canary.weight)} each" if canary else ""
    return f"generation {plan.generation}: v{plan.champion} is champion{slice_} ({plan.actor}: {plan.reason})"
