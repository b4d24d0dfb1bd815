"""What a seeded database says is served now, as the ledger of a serving one would."""

from __future__ import annotations

from engine.contracts import CANARY, CONTROL, Arm, ProposerKind, ServingPlan
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import publish
from engine.rollout.decide import PROMOTED_STATES
from engine.rollout.records import status_from_json
from engine.speculation.artifact import build_artifact
from engine.store.database import Database
from engine.store.repositories import plans, policies, rollouts


def add_versions(database: Database, store: ArtifactStore, newest: int) -> None:
    """Versions up to this number that any engine can load, each the child of the one before.

    They look prompts up and are told apart by what they note: a policy that was learned fits one target.
    """
    with database.read() as session:
        made = max(policies.numbers(session), default=0)
    for version in range(made + 1, newest + 1):
        files = build_artifact(ProposerKind.NGRAM, 4, lineage={"seeded": version})
        publish(database, store, files, parent=version - 1 or None, note="made up for a benchmark")


def serve_as_tried(database: Database, store: ArtifactStore) -> ServingPlan | None:
    """The plan of the rollout at work, for an engine to follow; None where there is none, or its versions have no
    files, as those of a database that was seeded without an engine."""
    with database.read() as session:
        tried, plan = rollouts.active(session), plans.latest(session)
        if tried is None or plan is None or not (status := status_from_json(tried.status)).serves:
            return None
        named = policies.some(session, (tried.champion, tried.canary))
    if not all(store.is_sound(version.digest) for version in named):
        return None
    promoted, weight = status.state in PROMOTED_STATES, status.present.weight
    with database.write() as session:
        return plans.append(
            session,
            champion=tried.canary if promoted else tried.champion,
            fallback=plan.fallback,
            rollback_to=tried.champion,
            arms=(Arm(CANARY, tried.canary, weight), Arm(CONTROL, tried.champion, weight)),
            salt=f"rollout-{tried.id}",
            actor=f"rollout {tried.id}",
            reason=status.reason,
            rollout_id=tried.id,
            idempotency_key=f"seeded {tried.id}",
        )
