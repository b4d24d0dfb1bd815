"""Making plans for a served engine, and seeing which arms its requests get."""

from __future__ import annotations

from engine.contracts import CANARY, CONTROL, Arm, ProposerKind, ServingPlan
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import publish
from engine.speculation.artifact import build_artifact
from engine.speculation.memory import MEMORY_FILE
from engine.store.repositories import plans
from tests.server.conftest import Served
from tests.trace_memory import TraceMemoryBuilder


def memory_version(served: Served, text: str) -> int:
    """A trace memory that has seen ``text``, published like any other."""
    target = served.server.target
    builder = TraceMemoryBuilder()
    builder.add("chat", target.tokenizer.encode("hello"), target.tokenizer.encode(text))
    files = build_artifact(
        ProposerKind.TRACE_MEMORY,
        3,
        files={MEMORY_FILE: builder.build(10**6)},
        target_fingerprint=target.fingerprint,
        tokenizer_fingerprint=target.tokenizer_fingerprint,
    )
    store = ArtifactStore(served.server.settings.dir("policies"))
    return publish(served.db, store, files).version


def start_canary(served: Served, version: int, weight: float = 0.5) -> ServingPlan:
    with served.db.write() as session:
        now = plans.latest(session)
        assert now is not None
        arms = (Arm(CANARY, version, weight), Arm(CONTROL, now.champion, weight))
        return plans.append(
            session,
            champion=now.champion,
            fallback=now.fallback,
            rollback_to=now.champion,
            arms=arms,
            salt="t",
            actor="test",
            reason="test",
        )


def arms_of(served: Served, n: int = 40) -> set[str]:
    answers = [served.completion(max_tokens=1, headers={"X-Conversation-Id": str(key)}) for key in range(n)]
    return {answer.headers["x-slipstream-arm"] for answer in answers}
