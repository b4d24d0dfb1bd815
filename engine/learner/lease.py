"""One learner at a time: its lease, kept from within an attempt however long that takes, and given up at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy.exc import OperationalError

from engine.store.database import Database, WriteSession
from engine.store.repositories import leases

LEASE, LEASE_S = "learner", 60.0
RENEWED = LEASE_S / 3
log = logging.getLogger(__name__)


class LearnerLease:
    """The right of this process to learn. ``token`` fences what is written under it."""

    def __init__(self, db: Database, clock: Callable[[], datetime]) -> None:
        self.db, self.clock = db, clock
        self.holder = leases.new_holder()
        self.token: int | None = None
        self._renewed = datetime.min

    def take(self) -> bool:
        """Take or prolong it; False while another learner is at work."""
        now = self.clock()
        with self.db.write() as session:
            self.token = leases.acquire(session, LEASE, self.holder, now, LEASE_S)
        self._renewed = now
        return self.token is not None

    def keep(self) -> None:
        """Called between the parts of an attempt, as often as there are any: prolongs it every third of its time.

        LeaseLost when another learner has begun meanwhile: what is left of the attempt would be thrown away. A database
        that does not answer ends nothing: whoever writes under the lease is checked then.
        """
        now = self.clock()
        if now - self._renewed < timedelta(seconds=RENEWED):
            return
        try:
            with self.db.write() as session:
                token = leases.acquire(session, LEASE, self.holder, now, LEASE_S)
        except OperationalError as error:
            log.warning("the lease could not be prolonged, trying again: %s", error)
            return
        if token != self.token:
            raise leases.LeaseLost(f"Another learner has taken the lease {LEASE!r} over: this attempt ends here.")
        self._renewed = now

    def check(self, session: WriteSession) -> None:
        """Inside the transaction that writes: LeaseLost unless it is still this learner's."""
        leases.check(session, LEASE, self.holder, self.token or 0)

    def release(self) -> None:
        """So that the next learner need not wait."""
        with self.db.write() as session:
            leases.release(session, LEASE, self.holder, self.clock())
