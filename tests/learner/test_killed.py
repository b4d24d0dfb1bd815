"""SIGKILL at random moments, three or twenty: no half-written version is ever visible, and the next learner goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import select

from engine.learner.learner import Learner
from engine.learner.lease import LEASE_S
from engine.store.database import Database
from engine.store.models import LearningIntakeRow
from engine.store.repositories import learning, policies
from tests.learner.test_learner import World

LONGEST_S = 2.0
"""An attempt here takes less: some learners are killed before it, most within, some after."""
NURSERY = """
import os, sys
from datetime import datetime
from engine.learner.learner import Learner
from engine.registry.artifacts import ArtifactStore
from engine.settings import load_settings
from engine.store.database import Database
import engine.learner.gate, engine.speculation.memory

settings = load_settings(flags=sys.argv[1:])
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        break
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
else:
    sys.exit()
now = datetime.fromisoformat(line.strip())
learner = Learner(settings, Database(settings.database_url), ArtifactStore(settings.dir("policies")), lambda: now)
while True:
    learner.attempt_if_due()
"""
"""Reads in the learner's libraries once. Each line it is sent is the time of a new learner, a process of its own."""


def nursery(url: str, home: Path) -> subprocess.Popen[str]:
    flags = [f"database_url={url}", f"home={home}", "learner.auto_rollout=false", "learner.duty_cycle=1"]
    flags += ["learner.every_requests=40", "learner.min_requests=40"]
    return subprocess.Popen(
        [sys.executable, "-c", NURSERY, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def start_and_kill(nursery: subprocess.Popen[str], now: datetime, after_s: float) -> None:
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    nursery.stdin.write(now.isoformat() + "\n")
    nursery.stdin.flush()
    victim = int(nursery.stdout.readline())
    try:
        time.sleep(after_s)
    finally:
        os.kill(victim, signal.SIGKILL)
    assert nursery.stdout.readline() == "gone\n"


def check(w: World) -> int:
    """Everything that can be seen is whole; how many versions the learner has made."""
    with w.db.read() as session:
        versions = [v for v in policies.all_versions(session) if v.parent_version is not None]
        made = [a.version for a in learning.attempts(session, 1_000) if a.version is not None]
        roles = {v.version: {p.role: p.traces for p in policies.lineage(session, v.version)} for v in versions}
        ordinals = list(session.scalars(select(LearningIntakeRow.ordinal).order_by(LearningIntakeRow.ordinal)))
    assert sorted(made) == sorted(v.version for v in versions)  # a version and its attempt, or neither
    assert all(w.store.is_sound(v.digest) for v in versions)
    assert all(found["train"] > 0 and found["gate"] > 0 for found in roles.values())
    assert ordinals == list(range(1, len(ordinals) + 1))
    return len(versions)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_learner_killed_at_any_moment_leaves_nothing_half_written(
    db: Database, database_url: str, tmp_path: Path, kills: int
) -> None:
    w, rng = World(db, tmp_path), np.random.default_rng(kills)
    learners = nursery(database_url, tmp_path)
    try:
        for _ in range(kills):
            w.serve(40)
            w.now += timedelta(seconds=LEASE_S + 1)  # the dead one's lease runs out
            w.beat()
            start_and_kill(learners, w.now, rng.uniform(0.0, LONGEST_S))  # the moment of the kill is what is tested
            check(w)
    finally:
        learners.kill()
        learners.communicate()
    before = check(w)
    w.serve(200)
    w.now += timedelta(seconds=LEASE_S + 1)
    w.beat()
    wanted = w.settings.learner.model_copy(update={"auto_rollout": False})
    learner = Learner(w.settings.model_copy(update={"learner": wanted}), db, w.store, lambda: w.now)
    attempt = learner.attempt_if_due()
    assert attempt is not None
    assert attempt.outcome in (learning.REGISTERED, learning.REFUSED), attempt.reason
    assert attempt.train_traces > 25 * kills  # it knows all that the killed ones had taken in
    w.store.sweep()
    assert not [path for path in w.store.root.iterdir() if path.name.startswith(".")]
    assert check(w) == before + (attempt.version is not None)
