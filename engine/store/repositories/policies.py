"""Policy versions and the traffic that made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import func, select, text, update
from sqlalchemy.dialects.postgresql import insert

from engine.contracts import PolicyVersion, ProposerKind
from engine.store.database import ReadSession, WriteSession
from engine.store.members import CHUNK, Members, place
from engine.store.models import LearningIntakeRow, PolicyLineageRow, PolicyVersionRow

TRAIN, GATE = "train", "gate"


@dataclass(frozen=True, slots=True)
class Lineage:
    """The traces one version learned from (role train) or was judged on (role gate), as ordinals of the intake."""

    role: str
    members: Members
    window_from: datetime
    window_to: datetime
    classes: Mapping[str, int]

    @property
    def traces(self) -> int:
        return len(self.members)


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
                chunks=list(part.members.chunks),
                bits=part.members.bits,
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


def clear_mlflow(session: WriteSession) -> None:
    """Forget under which numbers the MLflow registry kept the versions: it has lost them."""
    session.execute(update(PolicyVersionRow).values(mlflow_version=None, mlflow_run_id=None))


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


def numbers(session: ReadSession | WriteSession) -> list[int]:
    """Every version's number, newest first."""
    return list(session.scalars(select(PolicyVersionRow.version).order_by(PolicyVersionRow.version.desc())))


def some(session: ReadSession, versions: Sequence[int]) -> list[PolicyVersion]:
    """These versions, newest first; those that there are not are left out."""
    query = select(PolicyVersionRow).where(PolicyVersionRow.version.in_(versions))
    return [_version(row) for row in session.scalars(query.order_by(PolicyVersionRow.version.desc()))]


def kinds(session: ReadSession) -> dict[str, int]:
    """Versions by kind of proposer."""
    query = select(PolicyVersionRow.kind, func.count()).group_by(PolicyVersionRow.kind)
    return dict(session.execute(query).all())


def retire(session: WriteSession, versions: Sequence[int], reason: str, now: datetime) -> list[int]:
    """Versions that shall never be served again; says which of them were not retired before."""
    done = session.scalars(
        update(PolicyVersionRow)
        .where(PolicyVersionRow.version.in_(versions), PolicyVersionRow.retired_at.is_(None))
        .values(retired_at=now, retired_reason=reason)
        .returning(PolicyVersionRow.version)
    )
    return sorted(done)


def lineage(session: ReadSession | WriteSession, version: int) -> list[Lineage]:
    """Which traffic made this version."""
    query = select(PolicyLineageRow).where(PolicyLineageRow.version == version).order_by(PolicyLineageRow.role.desc())
    return [
        Lineage(r.role, Members(tuple(r.chunks), bytes(r.bits)), r.window_from, r.window_to, r.classes)
        for r in session.scalars(query)
    ]


def trace_ids(session: ReadSession | WriteSession, members: Members, limit: int = 100_000) -> list[UUID]:
    """The traces of a lineage, oldest first, those that are gone by now too."""
    query = (
        select(LearningIntakeRow.trace_id)
        .where(LearningIntakeRow.ordinal == func.any(members.ordinals()))
        .order_by(LearningIntakeRow.ordinal)
        .limit(limit)
    )
    return list(session.scalars(query))


def tenants(session: ReadSession | WriteSession, members: Members) -> dict[str, int]:
    """Traces by tenant of a lineage, most first; those without a tenant under an empty name."""
    name = func.coalesce(LearningIntakeRow.tenant, "")
    query = (
        select(name, func.count())
        .where(LearningIntakeRow.ordinal == func.any(members.ordinals()))
        .group_by(name)
        .order_by(func.count().desc(), name)
    )
    return dict(session.execute(query).all())


def lock_lineage(session: WriteSession) -> None:
    """Wait for every registration in flight and let none begin until this transaction ends."""
    session.execute(text("LOCK TABLE policy_lineage IN SHARE MODE"))


def influenced_by(session: ReadSession | WriteSession, trace_id: UUID) -> list[int]:
    """Which versions this trace taught, ascending; the other direction of lineage."""
    ordinal = session.scalar(select(LearningIntakeRow.ordinal).where(LearningIntakeRow.trace_id == trace_id))
    if ordinal is None:
        return []
    chunk, bit = place(ordinal)
    query = select(PolicyLineageRow.version).where(
        PolicyLineageRow.role == TRAIN,
        PolicyLineageRow.chunks.contains([chunk]),
        # NULL, not an error, where the chunk is not there
        func.get_bit(PolicyLineageRow.bits, (func.array_position(PolicyLineageRow.chunks, chunk) - 1) * CHUNK + bit)
        == 1,
    )
    return with_heirs(session, list(session.scalars(query)))


def influenced_by_any(session: ReadSession | WriteSession, ordinals: Sequence[int]) -> list[int]:
    """Which versions any of these traces taught, ascending."""
    wanted = Members.of(ordinals)
    query = select(PolicyLineageRow).where(
        PolicyLineageRow.role == TRAIN, PolicyLineageRow.chunks.overlap(list(wanted.chunks))
    )
    met = [row.version for row in session.scalars(query) if Members(tuple(row.chunks), bytes(row.bits)).meets(wanted)]
    return with_heirs(session, met)


def with_heirs(session: ReadSession | WriteSession, versions: Sequence[int]) -> list[int]:
    """These versions and all that started from their weights, ascending.

    A manifest names in ``lineage.draft`` the version whose weights it began with; what taught that taught its heirs.
    """
    query = text(
        "WITH RECURSIVE heirs AS ("
        " SELECT version, digest FROM policy_versions WHERE version = ANY(:versions)"
        " UNION SELECT v.version, v.digest FROM policy_versions v JOIN heirs h"
        "  ON v.manifest #>> '{lineage,draft}' = h.digest)"
        " SELECT version FROM heirs ORDER BY version"
    )
    return list(session.scalars(query, {"versions": list(versions)}))


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
        retired_at=row.retired_at,
    )
