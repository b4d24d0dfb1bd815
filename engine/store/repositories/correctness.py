"""Outputs that were compared with the target's own: how many, and the evidence of those that differed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert

from engine.contracts import CANARY
from engine.store.database import ReadSession, WriteSession
from engine.store.models import OutputAuditRow, OutputMismatchRow, ServingPlanRow


@dataclass(frozen=True, slots=True)
class AuditCounts:
    """What one engine process has audited of an arm in a class so far."""

    generation: int
    policy_version: int
    arm: str
    traffic_class: str
    audited: int = 0
    tokens: int = 0
    ties: int = 0
    mismatches: int = 0


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One output that is not the target's own (``OutputMismatchRow``)."""

    trace_id: UUID
    started_at: datetime
    replica_id: str
    policy_version: int
    arm: str
    generation: int
    traffic_class: str
    position: int
    served_token: int
    target_token: int
    gap: float
    tie: float

    def __str__(self) -> str:
        return (
            f"trace {self.trace_id} (v{self.policy_version}, {self.arm}, {self.traffic_class}): output token "
            f"{self.position} is {self.served_token}, the target's own is {self.target_token}, "
            f"{self.gap:.3g} apart (a tie up to {self.tie:g})"
        )


def write(
    session: WriteSession,
    writer_id: UUID,
    replica_id: str,
    counts: Sequence[AuditCounts],
    mismatches: Sequence[Mismatch],
) -> None:
    """Counts as they stand, over what this writer wrote of them before; mismatches once."""
    if counts:
        rows = [asdict(one) | {"writer_id": writer_id, "replica_id": replica_id} for one in counts]
        fill = insert(OutputAuditRow).values(rows)
        fresh = {name: fill.excluded[name] for name in ("audited", "tokens", "ties", "mismatches", "updated_at")}
        session.execute(
            fill.on_conflict_do_update(index_elements=list(OutputAuditRow.__table__.primary_key), set_=fresh)
        )
    if mismatches:
        fill = insert(OutputMismatchRow).values([asdict(one) for one in mismatches])
        session.execute(fill.on_conflict_do_nothing())


def mismatches(session: ReadSession | WriteSession, rollout_id: int, limit: int = 20) -> list[Mismatch]:
    """The newest evidence of a rollout's generations, the canary's first."""
    row = OutputMismatchRow
    of_rollout = select(ServingPlanRow.generation).where(ServingPlanRow.rollout_id == rollout_id)
    query = (
        select(row)
        .where(row.generation.in_(of_rollout))
        .order_by((row.arm != CANARY).asc(), row.found_at.desc())
        .limit(limit)
    )
    names = Mismatch.__dataclass_fields__
    return [Mismatch(**{name: getattr(found, name) for name in names}) for found in session.scalars(query)]


def forget(session: WriteSession, before: datetime) -> None:
    """Counts that were last brought up to date before then, and evidence found before then, go."""
    session.execute(delete(OutputAuditRow).where(OutputAuditRow.updated_at < before))
    session.execute(delete(OutputMismatchRow).where(OutputMismatchRow.found_at < before))
