"""Telling others of every transition of a rollout: a signed webhook, a command; tried again, and never in the way.

The notifier follows the append-only decisions behind a cursor of its own, one per sink, in a thread of its own: what is
slow or down delays notifications and nothing else. Of several notifiers the one with the lease delivers. A delivery can
come twice (a sink that answered and a cursor that could not be written); its id says so.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import shlex
import subprocess
import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol

import httpx
from sqlalchemy.exc import SQLAlchemyError

from engine.settings import RolloutSettings
from engine.store.database import Database
from engine.store.repositories import leases, notifications, rollouts
from engine.store.repositories.leases import LeaseLost
from engine.store.repositories.notifications import Cursor
from engine.store.repositories.rollouts import DecisionRecord

TIMEOUT_S, COMMAND_TIMEOUT_S = 5.0, 30.0
KEPT = timedelta(days=1)
"""So old a notification is given up at its next failure: the ones after it matter more. Each is tried at least once."""
MOST_WAIT_S = 300.0
BATCH = 20
LEASE, LEASE_S = "notify", 90.0
"""Prolonged before each delivery, which takes at most a third of it."""
log = logging.getLogger(__name__)


class Sink(Protocol):
    """Somewhere a notification goes; ``deliver`` raises where it did not arrive."""

    name: str

    def deliver(self, delivery: int, body: bytes, now: datetime) -> None: ...


class Webhook:
    """POST of JSON. ``X-Slipstream-Signature`` is sha256=HMAC(secret, timestamp + "." + body), as hex."""

    name = "webhook"

    def __init__(self, url: str, secret: str | None, client: httpx.Client | None = None) -> None:
        self._url, self._secret = url, secret
        self._client = client or httpx.Client(timeout=TIMEOUT_S)

    def deliver(self, delivery: int, body: bytes, now: datetime) -> None:
        stamp = str(int(now.timestamp()))
        headers = {
            "content-type": "application/json",
            "x-slipstream-delivery": str(delivery),
            "x-slipstream-timestamp": stamp,
        }
        if self._secret:
            headers["x-slipstream-signature"] = sign(self._secret, stamp, body)
        self._client.post(self._url, content=body, headers=headers).raise_for_status()


class Command:
    """A program that gets the notification as JSON on its standard input; anything but exit code 0 is a failure."""

    name = "command"

    def __init__(self, line: str) -> None:
        self._line = line

    def deliver(self, delivery: int, body: bytes, now: datetime) -> None:
        arguments = shlex.split(self._line)  # here, so that a missing quote is a failed delivery, which is shown
        # In a session of its own: one that asks a terminal for a password would be stopped, the controller with it.
        subprocess.run(
            arguments, input=body, check=True, capture_output=True, timeout=COMMAND_TIMEOUT_S, start_new_session=True
        )


def sinks(settings: RolloutSettings) -> list[Sink]:
    """Those that are configured."""
    found: list[Sink] = []
    if settings.webhook_url:
        found.append(Webhook(settings.webhook_url, settings.webhook_secret))
    if settings.notify_command:
        found.append(Command(settings.notify_command))
    return found


def sign(secret: str, stamp: str, body: bytes) -> str:
    return "sha256=" + hmac.new(secret.encode(), stamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def body(decision: DecisionRecord) -> bytes:
    """What is told of a transition."""
    tree: dict[str, Any] = {
        "rollout": decision.rollout_id,
        "decision": decision.id,
        "at": decision.decided_at.isoformat(),
        "from": decision.from_state.value,
        "to": decision.to_state.value,
        "verdict": decision.verdict.value,
        "action": decision.action,
        "reason": decision.reason,
        "generation": decision.generation,
        "canary": decision.status_before.get("canary"),
        "champion": decision.status_before.get("champion"),
    }
    return json.dumps(tree, sort_keys=True).encode()


class Notifier:
    """``tick`` delivers what is due to every sink, while no other notifier does; its state is in the database."""

    def __init__(
        self, db: Database, sinks: Sequence[Sink], holder: str, clock: Callable[[], datetime] | None = None
    ) -> None:
        self._db, self._sinks, self._holder = db, sinks, holder
        self._clock = clock or db.now

    def tick(self, now: datetime) -> int:
        """How many notifications arrived."""
        return sum(self._serve(sink, now) for sink in self._sinks)

    def release(self) -> None:
        with self._db.write() as session:
            leases.release(session, LEASE, self._holder, self._clock())

    def _serve(self, sink: Sink, now: datetime) -> int:
        token = self._lease(now)
        if token is None:
            return 0
        with self._db.write() as session:
            cursor = notifications.cursor(session, sink.name, rollouts.newest_decision(session), now)
        if cursor.next_at > now:
            return 0
        with self._db.read() as session:
            due = rollouts.transitions(session, cursor.decision_id, BATCH)
        arrived = 0
        for decision in due:
            assert decision.id is not None
            if self._lease(max(now, self._clock())) != token:
                return arrived  # another one has taken over, and may have told this already
            try:
                sink.deliver(decision.id, body(decision), now)
            except Exception as error:  # whatever a sink fails of, it is counted, shown, and holds up no other sink
                if not self._failed(sink, cursor, decision, error, now, token):
                    return arrived
                cursor = Cursor(sink.name, decision.id, 0, now, _said(error))
            else:
                arrived += 1
                cursor = Cursor(sink.name, decision.id, 0, now, None)
            self._advance(cursor, token)
        return arrived

    def _lease(self, now: datetime) -> int | None:
        """Take or prolong it; None while it is another's."""
        with self._db.write() as session:
            return leases.acquire(session, LEASE, self._holder, now, LEASE_S)

    def _advance(self, cursor: Cursor, token: int) -> None:
        """Only while the lease is ours: LeaseLost otherwise, and the cursor stays where its new keeper has it."""
        with self._db.write() as session:
            leases.check(session, LEASE, self._holder, token)
            notifications.advance(session, cursor)

    def _failed(
        self, sink: Sink, cursor: Cursor, decision: DecisionRecord, error: Exception, now: datetime, token: int
    ) -> bool:
        """Note the failure; True where it is given up and the next one may go."""
        tries = cursor.tries + 1
        if now - decision.decided_at >= KEPT:
            log.error("%s: decision %s given up after %d tries: %s", sink.name, decision.id, tries, _said(error))
            return True
        log.warning("%s: decision %s did not arrive, trying again: %s", sink.name, decision.id, _said(error))
        later = now + timedelta(seconds=min(MOST_WAIT_S, 2.0 ** min(tries, 10)))
        self._advance(Cursor(sink.name, cursor.decision_id, tries, later, _said(error)), token)
        return False


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def run(
    settings: RolloutSettings, db: Database, holder: str, stop: threading.Event, clock: Callable[[], datetime]
) -> None:
    """Deliver until ``stop`` is set; returns at once where no sink is configured."""
    found = sinks(settings)
    if not found:
        return
    notifier = Notifier(db, found, holder, clock)
    while not stop.is_set():
        try:
            notifier.tick(clock())
        except LeaseLost as error:
            log.warning("another notifier took over: %s", error)
        except SQLAlchemyError as error:
            log.error("notifications wait for the database: %s", error)
        except Exception:
            log.exception("notifying failed in a way nobody foresaw, trying again")
        stop.wait(settings.tick_s)
    try:
        notifier.release()
    except SQLAlchemyError as error:
        log.warning("the notifier's lease could not be released, it ends by itself: %s", error)
