"""What the engine replicas say of themselves."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert

from engine.contracts import ReplicaState
from engine.store.database import ReadSession, WriteSession
from engine.store.models import ReplicaRow


def beat(session: WriteSession, state: ReplicaState) -> None:
    """Write a replica's heartbeat over its last one."""
    values = {
        "replica_id": state.replica_id,
        "address": state.address,
        "model": state.model,
        "started_at": state.started_at,
        "heartbeat_at": state.heartbeat_at,
        "observed_generation": state.observed_generation,
        "resident": list(state.resident),
        "stats": state.stats,
    }
    session.execute(
        insert(ReplicaRow).values(**values).on_conflict_do_update(index_elements=["replica_id"], set_=values)
    )


def live(session: ReadSession | WriteSession, since: datetime) -> list[ReplicaState]:
    """Replicas whose last heartbeat is not older than ``since``."""
    rows = session.scalars(select(ReplicaRow).where(ReplicaRow.heartbeat_at >= since).order_by(ReplicaRow.replica_id))
    return [
        ReplicaState(
            replica_id=row.replica_id,
            address=row.address,
            model=row.model,
            started_at=row.started_at,
            heartbeat_at=row.heartbeat_at,
            observed_generation=row.observed_generation,
            resident=tuple(row.resident),
            stats=row.stats,
        )
        for row in rows
    ]
