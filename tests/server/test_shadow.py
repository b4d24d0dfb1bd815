"""Shadow mode end to end: drafts on copies, serves nobody, and is known before it does."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np
import pytest
from sqlalchemy import func, select

from engine.contracts import SHADOW, Arm, ProposerKind, RolloutState, ServingPlan, Status
from engine.demo.garbage import spoil
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import publish
from engine.rollout import specs
from engine.rollout.controller import Controller
from engine.rollout.guards import Shadow
from engine.rollout.launch import launch
from engine.rollout.replay import replay
from engine.server import shadow as server_shadow
from engine.server.spare import SETTLED_S
from engine.speculation.artifact import build_artifact
from engine.speculation.memory import MEMORY_FILE, TraceMemoryDrafter
from engine.store.models import ShadowRequestRow, TraceRow
from engine.store.repositories import plans, rollouts
from engine.store.repositories.rollouts import Rollout
from tests.server.conftest import Served, Start
from tests.telemetry.records import record
from tests.trace_memory import TraceMemoryBuilder
from tests.waiting import until

WANTED = 30


def ask(served: Served, key: int) -> tuple[str, str]:
    """(prompt, what was said)."""
    prompt = f"number {key % 7} of the hello"
    headers = {"X-Conversation-Id": f"c{key}", "X-Traffic-Class": "chat"}
    answer = served.completion(prompt=prompt, max_tokens=24, ignore_eos=True, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["x-slipstream-arm"] == "champion"
    return prompt, answer.json()["choices"][0]["text"]


def memory_files(served: Served) -> dict[str, bytes]:
    target, builder = served.server.target, TraceMemoryBuilder()
    for key in range(7):
        prompt, said = ask(served, key)
        builder.add("chat", target.tokenizer.encode(prompt), target.tokenizer.encode(said))
    return build_artifact(
        ProposerKind.TRACE_MEMORY,
        4,
        files={MEMORY_FILE: builder.build(10**6)},
        target_fingerprint=target.fingerprint,
        tokenizer_fingerprint=target.tokenizer_fingerprint,
    )


def shadowed(served: Served, files: dict[str, bytes], until_state: RolloutState, wanted: int = WANTED) -> Rollout:
    """A rollout of these files from its start to a state; every request meanwhile goes to the champion."""
    version = publish(served.db, ArtifactStore(served.server.settings.dir("policies")), files).version
    spec = replace(specs.preset("fast"), shadow=Shadow(wanted))
    made, controller = launch(served.db, canary=version, actor="ann", spec=spec), Controller(served.db, "c", 15.0)
    controller.tick(served.db.now())
    with served.db.read() as session:
        plan = plans.latest(session)
    assert plan is not None
    arm = plan.arm(SHADOW)
    assert arm is not None
    assert (arm.policy_version, arm.weight, plan.rollback_to) == (version, 0.0, plan.champion)
    served.observes(plan.generation)
    keys = itertools.count()

    def there() -> bool:
        ask(served, next(keys))  # copies wait in a short queue: traffic must go on
        controller.tick(served.db.now())
        with served.db.read() as session:
            found = rollouts.get(session, made.id)
        return found is not None and found.state is until_state

    until(there, f"the rollout is {until_state}", tries=600, pause_s=1.5 * SETTLED_S)  # a third of it is spare
    with served.db.read() as session:
        found = rollouts.get(session, made.id)
        assert session.scalar(select(func.count()).where(TraceRow.policy_version == version)) == 0, "it served somebody"
        seen = session.scalar(select(func.count()).where(ShadowRequestRow.policy_version == version)) or 0
        assert replay(made, rollouts.decisions(session, made.id)).agrees
    assert found is not None
    assert seen >= 12
    return found


def test_a_good_draft_goes_on_from_its_shadow(start: Start) -> None:
    served = start("engine.audit_tokens_per_minute=0")
    found = shadowed(served, memory_files(served), RolloutState.RAMPING)
    assert f"of {WANTED} requests drafted in shadow, none served" in found.status["reason"]


def test_garbage_is_found_in_its_shadow_and_serves_nobody(start: Start) -> None:
    served = start()
    good = memory_files(served)
    store = ArtifactStore(served.server.settings.dir("policies"))
    champion = publish(served.db, store, good).version
    with served.db.write() as session:
        plan = plans.latest(session)
        assert plan is not None
        made = plans.append(session, champion=champion, fallback=plan.fallback, actor="ann", reason="good")
    served.observes(made.generation)
    found = shadowed(served, spoil(good, np.random.default_rng(0)), RolloutState.ROLLED_BACK, wanted=3 * WANTED)
    assert found.status["reason"].startswith("in shadow: tokens_per_step")
    assert not found.status["stages"]


def test_a_draft_that_throws_is_found_in_its_shadow(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The champion is plain decoding, against which a draft that only fails loses nothing but its errors."""
    served = start("engine.audit_tokens_per_minute=0")
    files = memory_files(served)
    with served.db.write() as session:
        plan = plans.latest(session)
        assert plan is not None
        made = plans.append(session, champion=plan.fallback, fallback=plan.fallback, actor="ann", reason="plain")
    served.observes(made.generation)
    monkeypatch.setattr(TraceMemoryDrafter, "propose", lambda self, k: 1 // 0)
    found = shadowed(served, files, RolloutState.ROLLED_BACK)
    assert found.status["reason"].startswith("in shadow: errors:")
    assert not found.status["stages"]


def test_what_was_served_under_an_earlier_plan_is_not_replayed_for_a_later_one() -> None:
    """It may have taught the later canary, or be of traffic that its rollout is not to see."""
    first = ServingPlan(3, 1, 1, (Arm(SHADOW, 2, 0.0),), "", "t", "t", datetime(2026, 3, 1, tzinfo=UTC))
    now = [first]
    shadow = server_shadow.Shadow(cast(Any, None), cast(Any, None), lambda: now[0], lambda: 0.0)
    shadow.offer(record(1, status=Status.OK, output_tokens=8), None)
    assert shadow.due_in() == 0.0
    now[0] = replace(first, generation=4, arms=(Arm(SHADOW, 9, 0.0),))
    assert shadow.due_in() is None
