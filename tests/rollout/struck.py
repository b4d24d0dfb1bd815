"""A controller in a process of its own, which SIGKILL strikes at a chosen moment of its first transition."""

from __future__ import annotations

import multiprocessing
import os
import signal
from datetime import datetime
from multiprocessing.connection import Connection
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from engine.contracts import ServingPlan, SlipstreamError
from engine.rollout import controller as controller_module
from engine.rollout.controller import Controller
from engine.store.database import Database, WriteSession

multiprocessing.set_forkserver_preload([__name__])
FORKS = multiprocessing.get_context("forkserver")
"""Each controller is forked from a process that has imported all of this once."""
LEASE_S = 15.0


class Child:
    """``moment``: before the commit of its first transition, after it, or never. Times are told to it.

    ``torn`` is a planted fault: its plans are committed by themselves.
    """

    def __init__(self, url: str, holder: str, moment: str, torn: bool = False) -> None:
        self.moment, self.tokens = moment, set[int]()  # those it wrote decisions under
        self._told, theirs = FORKS.Pipe()
        self._process = FORKS.Process(target=_act, args=(theirs, url, holder, moment, torn), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, now: datetime) -> None:
        self._told.send(now)

    def answer(self) -> str:
        """What became of the tick; empty where it killed the process."""
        try:
            said, tokens = self._told.recv()
        except (EOFError, ConnectionResetError):
            return ""
        self.tokens |= tokens
        return str(said)

    def tick(self, now: datetime) -> str:
        self.ask(now)
        return self.answer()

    def died(self) -> int | None:
        self._process.join(60)
        return self._process.exitcode

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._told.close()


def _act(told: Connection, url: str, holder: str, moment: str, torn: bool) -> None:
    database, written, tokens = Database(url), list[str](), set[int]()

    def note(_connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if statement.startswith("INSERT INTO rollout_decisions"):
            tokens.add(values["fencing_token"])
            if values["from_state"] != values["to_state"] or values["action"] != "none":
                written.append(values["to_state"])

    def strike(*_: Any) -> None:
        if written:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(database.engine, "before_cursor_execute", note)
    if moment == "before":
        event.listen(database.engine, "commit", strike)
    if moment == "after":
        event.listen(Session, "after_commit", strike)
    if torn:
        _tear(database)
    controller = Controller(database, holder, LEASE_S)
    while True:
        try:
            now = told.recv()
        except EOFError:
            return
        tokens.clear()
        try:
            decision = controller.tick(now)
            told.send(("idle" if decision is None else decision.to_state.value, tokens))
        except SlipstreamError as error:
            told.send((type(error).__name__, tokens))


def _tear(database: Database) -> None:
    whole = controller_module.append_plan

    def alone(_: WriteSession, *rest: Any) -> ServingPlan:
        with database.write() as session:
            return whole(session, *rest)

    controller_module.append_plan = alone
