"""Leases with fencing tokens: who may act, and how a writer that was asleep is told that it no longer may."""

from __future__ import annotations

import os
import socket
import uuid
from datetime import datetime, timedelta

from sqlalchemy import case, or_, select
from sqlalchemy.dialects.postgresql import insert

from engine.contracts import SlipstreamError
from engine.store.database import ReadSession, WriteSession
from engine.store.models import LeaseRow


class LeaseLost(SlipstreamError):
    """Somebody else holds the lease now: what was decided under it must not be applied."""


def new_holder() -> str:
    """A holder's name that tells people which process it is, and is no other's."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"


def acquire(session: WriteSession, name: str, holder: str, now: datetime, lease_s: float) -> int | None:
    """Take or prolong a lease; gives its fencing token, or None while another holds it.

    The token grows whenever the lease changes hands, and only then.
    """
    fresh = insert(LeaseRow).values(name=name, holder=holder, token=1, expires_at=now + timedelta(seconds=lease_s))
    statement = fresh.on_conflict_do_update(
        index_elements=["name"],
        set_={
            "holder": holder,
            "token": LeaseRow.token + case((LeaseRow.holder == holder, 0), else_=1),
            "expires_at": fresh.excluded.expires_at,
        },
        where=or_(LeaseRow.holder == holder, LeaseRow.expires_at <= now),
    ).returning(LeaseRow.token)
    return session.scalar(statement)


def check(session: WriteSession, name: str, holder: str, token: int) -> None:
    """Inside the transaction that acts: LeaseLost unless the lease is still this holder's with this token.

    The row stays locked until the transaction ends, so nobody can take the lease in between.
    """
    row = session.scalar(select(LeaseRow).where(LeaseRow.name == name).with_for_update())
    if row is None or row.holder != holder or row.token != token:
        found = "nobody" if row is None else f"{row.holder} with token {row.token}"
        raise LeaseLost(f"Lease {name!r} is held by {found}, not by {holder} with token {token}: nothing was applied.")


def release(session: WriteSession, name: str, holder: str, now: datetime) -> None:
    """Give a lease up, so that the next holder need not wait. The row stays, and with it the token."""
    row = session.scalar(select(LeaseRow).where(LeaseRow.name == name, LeaseRow.holder == holder).with_for_update())
    if row is not None:
        row.expires_at = now


def holder(session: ReadSession | WriteSession, name: str) -> LeaseRow | None:
    return session.get(LeaseRow, name)
