"""What tenants allow, and forgetting one: its traces go, what they influenced can still be named."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert

from engine.store.database import ReadSession, WriteSession
from engine.store.models import (
    LearningIntakeRow,
    OutputMismatchRow,
    ShadowRequestRow,
    TenantSettingRow,
    TracePayloadRow,
    TraceRow,
)


def allow_training(session: WriteSession, tenant: str, train: bool, actor: str, now: datetime) -> None:
    """From now on, also for traces that are stored already: whether anything may learn from this tenant."""
    values = {"tenant": tenant, "train": train, "actor": actor, "updated_at": now}
    session.execute(
        insert(TenantSettingRow).values(**values).on_conflict_do_update(index_elements=["tenant"], set_=values)
    )


def opted_out(session: ReadSession) -> list[str]:
    return sorted(session.scalars(select(TenantSettingRow.tenant).where(~TenantSettingRow.train)))


def ordinals(session: ReadSession | WriteSession, tenant: str) -> list[int]:
    """Everything of a tenant that was ever taken in, the forgotten traces too."""
    return list(session.scalars(select(LearningIntakeRow.ordinal).where(LearningIntakeRow.tenant == tenant)))


def forget(session: WriteSession, tenant: str, now: datetime) -> int:
    """Delete a tenant's traces with their tokens, and mark them in the intake; how many traces went."""
    theirs = select(TraceRow.started_at, TraceRow.trace_id).where(TraceRow.tenant == tenant).subquery()
    session.execute(
        delete(TracePayloadRow).where(
            TracePayloadRow.started_at == theirs.c.started_at, TracePayloadRow.trace_id == theirs.c.trace_id
        )
    )
    gone = session.execute(delete(TraceRow).where(TraceRow.tenant == tenant).returning(TraceRow.trace_id)).all()
    ids = [trace_id for (trace_id,) in gone]
    for found in (ShadowRequestRow, OutputMismatchRow):  # what spare time found out about them
        session.execute(delete(found).where(found.trace_id == func.any(ids)))
    session.execute(
        update(LearningIntakeRow)
        .where(LearningIntakeRow.tenant == tenant, LearningIntakeRow.forgotten_at.is_(None))
        .values(forgotten_at=now)
    )
    return len(gone)
