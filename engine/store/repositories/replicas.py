"""What the engine replicas say of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, or_, select
from sqlalchemy.dialects.postgresql import insert

from engine.contracts import ReplicaState, ServingPlan, SlipstreamError
from engine.store.database import ReadSession, WriteSession, server_clock
from engine.store.models import PlanObservationRow, ReplicaRow

ALIVE = timedelta(seconds=10)
"""A replica that has said nothing for longer is taken for silent: gone, cut off, or stuck."""


class NameTaken(SlipstreamError):
    """Another replica of this name is alive: what one of them has observed would be said of both."""


def enter(session: WriteSession, replica_id: str, now: datetime) -> bool:
    """Before the first heartbeat: whether one of this name ended without saying so. NameTaken while it is alive."""
    row = session.scalar(select(ReplicaRow).where(ReplicaRow.replica_id == replica_id))
    if row is not None and now - row.heartbeat_at <= ALIVE:
        raise _taken(replica_id)
    return row is not None


def beat(session: WriteSession, state: ReplicaState) -> None:
    """Write a replica's heartbeat over its last one; NameTaken where another one alive has its name."""
    values = {
        "replica_id": state.replica_id,
        "address": state.address,
        "model": state.model,
        "started_at": state.started_at,
        "heartbeat_at": state.heartbeat_at,
        "observed_generation": state.observed_generation,
        "resident": list(state.resident),
        "lease_s": state.lease_s,
        "stats": state.stats,
    }
    written = session.execute(
        insert(ReplicaRow)
        .values(**values)
        .on_conflict_do_update(
            index_elements=["replica_id"],
            set_=values,
            where=or_(ReplicaRow.started_at == state.started_at, ReplicaRow.heartbeat_at < state.heartbeat_at - ALIVE),
        )
        .returning(ReplicaRow.replica_id)
    )
    if written.first() is None:
        raise _taken(state.replica_id)


def leave(session: WriteSession, replica_id: str, started_at: datetime) -> None:
    """A replica has stopped in order and serves nothing any more; one started since under its name is left alone."""
    session.execute(delete(ReplicaRow).where(ReplicaRow.replica_id == replica_id, ReplicaRow.started_at == started_at))


def live(
    session: ReadSession | WriteSession, now: datetime | None = None, within: timedelta = ALIVE
) -> list[ReplicaState]:
    """Replicas whose last heartbeat is not older than ``within``, by the database's clock unless ``now`` is given."""
    since = (now or server_clock(session)) - within
    rows = session.scalars(select(ReplicaRow).where(ReplicaRow.heartbeat_at >= since).order_by(ReplicaRow.replica_id))
    return [_state(row) for row in rows]


def may_serve(session: ReadSession | WriteSession, now: datetime) -> list[ReplicaState]:
    """Replicas that may still give requests to a canary: the live ones, and the silent ones within their lease."""
    rows = session.scalars(select(ReplicaRow).order_by(ReplicaRow.replica_id))
    return [_state(row) for row in rows if now - row.heartbeat_at <= timedelta(seconds=row.lease_s) + ALIVE]


def _taken(replica_id: str) -> NameTaken:
    return NameTaken(
        f"A replica {replica_id!r} is alive already, or died within the last {ALIVE.total_seconds():.0f} s. "
        "Give this one a name of its own (--set engine.replica_id=NAME), or wait."
    )


@dataclass(frozen=True, slots=True)
class Effect:
    """How a plan took effect, by the database's clock.

    ``seconds``: replicas that route by it or a later one → seconds until they did, None where that is not on record.
    ``behind`` are live ones that do not, ``silent`` ones that may still route by an older plan until their lease ends,
    ``problems`` what could not be loaded.
    """

    generation: int
    seconds: Mapping[str, float | None]
    behind: tuple[str, ...]
    silent: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        return bool(self.seconds) and not self.behind and not self.silent

    @property
    def slowest(self) -> float | None:
        return max((s for s in self.seconds.values() if s is not None), default=None)


def effect(session: ReadSession | WriteSession, plan: ServingPlan) -> Effect:
    now = server_clock(session)
    later = select(PlanObservationRow).where(PlanObservationRow.generation >= plan.generation)
    first = {row.replica_id: row for row in session.scalars(later.order_by(PlanObservationRow.generation.desc()))}
    seconds, behind, silent = dict[str, float | None](), list[str](), list[str]()
    for replica in may_serve(session, now):
        name = replica.replica_id
        if (replica.observed_generation or 0) >= plan.generation or name in first:
            seen = first.get(name)
            seconds[name] = (seen.observed_at - plan.created_at).total_seconds() if seen is not None else None
        else:
            (behind if now - replica.heartbeat_at <= ALIVE else silent).append(name)
    problems = tuple(f"{row.replica_id}: {row.error}" for row in first.values() if row.error is not None)
    return Effect(plan.generation, seconds, tuple(behind), tuple(silent), problems)


def _state(row: ReplicaRow) -> ReplicaState:
    return ReplicaState(
        replica_id=row.replica_id,
        address=row.address,
        model=row.model,
        started_at=row.started_at,
        heartbeat_at=row.heartbeat_at,
        observed_generation=row.observed_generation,
        resident=tuple(row.resident),
        stats=row.stats,
        lease_s=row.lease_s,
    )
