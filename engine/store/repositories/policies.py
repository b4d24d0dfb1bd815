"""Policy versions and the traffic that made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert

from engine.contracts import PolicyVersion, ProposerKind
from engine.store.database import ReadSession, WriteSession
from engine.store.models import PolicyLineageRow, PolicyVersionRow


@dataclass(frozen=True, slots=True)
class Lineage:
    """The traces one version learned from (role train) or was judged on (role gate)."""

    role: str
    trace_ids: Sequence[UUID]
    window_from: datetime
    window_to: datetime
    classes: Mapping[str, int]


def register(
    session: WriteSession,
    *,
    digest: str,
    kind: ProposerKind,
    num_speculative_tokens: int,
    manifest: dict[str, Any],
    parent_version: int | None = None,
    gate: dict[str, Any] | None = None,
    note: str = "",
    lineage: Sequence[Lineage] = (),
) -> PolicyVersion:
    """Make a version of an artifact, once: the same digest again gives the version it already has."""
    session.execute(
        insert(PolicyVersionRow)
        .values(
            digest=digest,
            kind=kind.value,
            num_speculative_tokens=num_speculative_tokens,
            manifest=manifest,
            parent_version=parent_version,
            gate=gate,
            note=note,
        )
        .on_conflict_do_nothing(index_elements=["digest"])
    )
    row = session.scalars(select(PolicyVersionRow).where(PolicyVersionRow.digest == digest)).one()
    for part in lineage:
        session.execute(
            insert(PolicyLineageRow)
            .values(
                version=row.version,
                role=part.role,
                trace_ids=list(part.trace_ids),
                window_from=part.window_from,
                window_to=part.window_to,
                classes=dict(part.classes),
            )
            .on_conflict_do_nothing()
        )
    return _version(row)


def set_mlflow(session: WriteSession, version: int, mlflow_version: str, run_id: str | None) -> None:
    """Record under which number the MLflow registry keeps a version."""
    session.execute(
        update(PolicyVersionRow)
        .where(PolicyVersionRow.version == version)
        .values(mlflow_version=mlflow_version, mlflow_run_id=run_id)
    )


def get(session: ReadSession | WriteSession, version: int) -> PolicyVersion | None:
    row = session.get(PolicyVersionRow, version)
    return _version(row) if row else None


def by_digest(session: ReadSession | WriteSession, digest: str) -> PolicyVersion | None:
    row = session.scalar(select(PolicyVersionRow).where(PolicyVersionRow.digest == digest))
    return _version(row) if row else None


def all_versions(session: ReadSession | WriteSession, limit: int = 10_000) -> list[PolicyVersion]:
    """Newest first."""
    rows = session.scalars(select(PolicyVersionRow).order_by(PolicyVersionRow.version.desc()).limit(limit))
    return [_version(row) for row in rows]


def lineage(session: ReadSession | WriteSession, version: int) -> list[Lineage]:
    """Which traffic made this version."""
    rows = session.scalars(select(PolicyLineageRow).where(PolicyLineageRow.version == version))
    return [Lineage(r.role, r.trace_ids, r.window_from, r.window_to, r.classes) for r in rows]


def influenced_by(session: ReadSession | WriteSession, trace_id: UUID) -> list[int]:
    """Which versions this trace taught; the other direction of lineage."""
    query = (
        select(PolicyLineageRow.version)
        .where(PolicyLineageRow.role == "train", PolicyLineageRow.trace_ids.contains([trace_id]))
        .order_by(PolicyLineageRow.version)
    )
    return list(session.scalars(query))


def _version(row: PolicyVersionRow) -> PolicyVersion:
    return PolicyVersion(
        version=row.version,
        digest=row.digest,
        kind=ProposerKind(row.kind),
        num_speculative_tokens=row.num_speculative_tokens,
        manifest=row.manifest,
        created_at=row.created_at,
        parent_version=row.parent_version,
        mlflow_version=row.mlflow_version,
        mlflow_run_id=row.mlflow_run_id,
    )
