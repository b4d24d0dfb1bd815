"""The demo's plot: traffic, a draft learned from it, a canary, its promotion; then a bad draft and its rollback.

Nothing here is staged but the traffic and the bad policy: the learner, the gate, the controller and its guards decide
as they always do, and the story tells what they did.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from engine.contracts import TERMINAL_STATES, RolloutState, SlipstreamError
from engine.demo import garbage, prompts
from engine.demo.narrator import Narrator
from engine.demo.traffic import Traffic, served_model
from engine.ops import system
from engine.ops.supervisor import Say, Supervisor
from engine.rollout.launch import launch
from engine.settings import Settings
from engine.store.database import Database
from engine.store.repositories import audit, rollouts

CLIENTS = 8
SEED = 20_26
GOOD_ENDS = frozenset({RolloutState.PROMOTED, RolloutState.WATCHING, RolloutState.DONE})


def settings(base: Settings) -> Settings:
    """The operator's settings with a learner and guards quick enough for ten minutes on a laptop."""
    return base.model_copy(
        update={
            "learner": base.learner.model_copy(
                update={"every_requests": 160, "min_requests": 64, "auto_rollout": True}
            ),
            "rollout": base.rollout.model_copy(update={"preset": "fast"}),
        }
    )


def tell(
    chosen: Settings, configured: Settings, supervisor: Supervisor, say: Say, patience_s: float, hold: bool
) -> None:
    """Play the story; ``configured`` is what the operator chose, ``chosen`` the same with addresses filled in.

    SlipstreamError naming the chapter that did not come to its end within ``patience_s``.
    """
    database = Database(chosen.database_url or "", application="slipstream demo")
    url = f"http://{chosen.engine.host}:{chosen.engine.port}"
    traffic = Traffic(
        url, served_model(url), prompts.shipped(), CLIENTS, SEED, on_failure=lambda e: say(f"a request failed: {e}")
    )
    with database.read() as session:
        narrator = Narrator.from_now(session)
    stage = _Stage(configured, database, supervisor, narrator, say, patience_s)
    board = f"http://{chosen.dashboard.host}:{chosen.dashboard.port}"
    try:
        say(f"traffic of four classes begins: {CLIENTS} clients, greedy, prompts of the project's own set")
        traffic.start()
        stage.until("the first traces", lambda: stage.traces() >= CLIENTS)
        say(f"traces arrive: see {board}")
        stage.until("a learned policy is promoted", stage.promoted)
        say("now a deliberately bad policy: a memory that drafts garbage, registered past the gate")
        bad = garbage.publish(chosen, database, np.random.default_rng(SEED))
        stage.until("a rollout of the bad policy begins", lambda: stage.begins(bad.version))
        stage.until("the bad policy is taken back", lambda: stage.state_of(bad.version) in TERMINAL_STATES)
        _close(stage.state_of(bad.version), say)
        say(f"{traffic.answered} requests answered, {traffic.failed} failed; look around: {board}")
        if hold:
            say("traffic goes on; Ctrl-C stops everything")
            stage.until("for ever", lambda: False, patience_s=float("inf"))
    finally:
        traffic.stop()
        database.close()


def _close(state: RolloutState | None, say: Say) -> None:
    if state is not RolloutState.ROLLED_BACK:
        raise SlipstreamError(
            f"The bad policy's rollout ended as {state}, not ROLLED_BACK: that is a fault, please report it."
        )
    say("the guard took it back; nobody saw a wrong token, no draft can change one")


class _Stage:
    """Waits for what the system does by itself, and tells what happens meanwhile."""

    def __init__(
        self,
        configured: Settings,
        database: Database,
        supervisor: Supervisor,
        narrator: Narrator,
        say: Say,
        patience_s: float,
    ) -> None:
        self.configured, self.database, self.supervisor = configured, database, supervisor
        self.narrator, self.say, self.patience_s = narrator, say, patience_s
        self.began = database.now()
        with database.read() as session:
            self.traces_before = audit.traces(session)

    def until(self, what: str, condition: Callable[[], bool], patience_s: float | None = None) -> None:
        deadline = time.monotonic() + (self.patience_s if patience_s is None else patience_s)
        while not self._look(condition):
            system.watch_once(self.configured, self.supervisor, self.say)
            if time.monotonic() > deadline:
                raise SlipstreamError(f"Waited {self.patience_s:.0f} s in vain for: {what}. See `slipstream logs`.")
            threading.Event().wait(0.5)

    def _look(self, condition: Callable[[], bool]) -> bool:
        """Tell what is new and see whether the chapter is over. A database that is away is no end of the story."""
        try:
            with self.database.read() as session:
                for line in self.narrator.lines(session):
                    self.say(line)
            return condition()
        except SQLAlchemyError as error:
            self.say(f"the database is away: {str(error).splitlines()[0]}")
            return False

    def traces(self) -> int:
        """Traces written since the story began."""
        with self.database.read() as session:
            return audit.traces(session) - self.traces_before

    def promoted(self) -> bool:
        """Whether a rollout of this story has made a learned version champion."""
        with self.database.read() as session:
            found = rollouts.list_rollouts(session)
        return any(r.state in GOOD_ENDS and r.created_at >= self.began for r in found)

    def begins(self, version: int) -> bool:
        """Start the rollout of a version; False while another one is active: the learner may have been faster."""
        with self.database.read() as session:
            if rollouts.active(session) is not None:
                return False
        try:
            launch(self.database, canary=version, preset="fast", name=f"bad v{version}", actor="demo")
        except SlipstreamError as error:
            self.say(f"not yet: {error}")
            return False
        return True

    def state_of(self, version: int) -> RolloutState | None:
        """The state of the newest rollout of a version."""
        with self.database.read() as session:
            return next((r.state for r in rollouts.list_rollouts(session) if r.canary == version), None)
