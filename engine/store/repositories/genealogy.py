"""Where a version comes from and what came of it: its family, whose traffic taught it, how its rollouts ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, select, text

from engine.contracts import ProposerKind, RolloutState
from engine.store.database import ReadSession
from engine.store.members import Members
from engine.store.models import PolicyLineageRow, PolicyVersionRow, RolloutRow, ServingPlanRow
from engine.store.repositories.policies import TRAIN

UP, DOWN, CHILDREN = 4, 3, 4
"""Generations before and after the chosen version, and children shown of each."""
SAMPLED = 500
"""Traces of a version's training traffic whose own versions are looked up, evenly over all of it."""


@dataclass(frozen=True, slots=True)
class Kin:
    """A version near the chosen one; ``distance`` in generations, negative for ancestors. ``more`` of its children
    are not shown."""

    version: int
    kind: ProposerKind
    parent: int | None
    distance: int
    is_retired: bool
    more: int = 0


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a version in service: it was champion once; its newest rollout as a canary ended so."""

    was_champion: bool
    rollout: RolloutState | None


def family(session: ReadSession, version: int, up: int = UP, down: int = DOWN, children: int = CHILDREN) -> list[Kin]:
    """The ancestors of a version, its siblings and its descendants, as many as can be read; empty for none such.

    Of the children of one version those that have children themselves come first, then the newest: the line that
    went on is shown whatever was tried beside it.
    """
    found = _ancestors(session, version, up)
    if not found:
        return []
    me = next(kin for kin in found if kin.version == version)
    shown = {kin.version: kin for kin in found}
    if me.parent in shown:
        _add_children(session, shown, [me.parent], children)
    level = [version]
    for _ in range(down):
        if not (level := _add_children(session, shown, level, children)):
            break
    return sorted(shown.values(), key=lambda kin: (kin.distance, kin.version))


def fates(session: ReadSession, versions: Sequence[int]) -> dict[int, Fate]:
    """By version, from the ledger and the rollouts."""
    champions = set(
        session.scalars(select(ServingPlanRow.champion).where(ServingPlanRow.champion.in_(versions)).distinct())
    )
    newest = select(func.max(RolloutRow.id)).where(RolloutRow.canary.in_(versions)).group_by(RolloutRow.canary)
    ended = session.execute(select(RolloutRow.canary, RolloutRow.state).where(RolloutRow.id.in_(newest)))
    states = {canary: RolloutState(state) for canary, state in ended}
    return {version: Fate(version in champions, states.get(version)) for version in versions}


def taught_by(session: ReadSession, versions: Sequence[int], most: int = SAMPLED) -> dict[int, dict[int, int]]:
    """Version → the versions that served its training traffic → traces: all of it up to ``most``, else so many
    spread evenly over it. Those past their retention are missing, so the counts say on how many a share rests."""
    rows = session.scalars(
        select(PolicyLineageRow).where(PolicyLineageRow.version.in_(versions), PolicyLineageRow.role == TRAIN)
    )
    pairs = [
        (row.version, ordinal)
        for row in rows
        for ordinal in _spread(Members(tuple(row.chunks), bytes(row.bits)).ordinals(), most)
    ]
    query = text(
        "SELECT wanted.version, t.policy_version, count(*)"
        " FROM unnest(CAST(:versions AS int[]), CAST(:ordinals AS bigint[])) AS wanted (version, ordinal)"
        " JOIN learning_intake i USING (ordinal)"
        " JOIN traces t ON t.started_at = i.started_at AND t.trace_id = i.trace_id"
        " GROUP BY 1, 2 ORDER BY 1, 3 DESC, 2"
    )
    found: dict[int, dict[int, int]] = {}
    values = {"versions": [version for version, _ in pairs], "ordinals": [ordinal for _, ordinal in pairs]}
    for learner, teacher, traces in session.execute(query, values) if pairs else ():
        found.setdefault(learner, {})[teacher] = traces
    return found


def _spread(ordinals: Sequence[int], most: int) -> Sequence[int]:
    return ordinals[:: -(-len(ordinals) // most)] if len(ordinals) > most else ordinals


def _ancestors(session: ReadSession, version: int, up: int) -> list[Kin]:
    query = text(
        "WITH RECURSIVE line AS ("
        " SELECT version, kind, parent_version, retired_at, 0 AS distance FROM policy_versions WHERE version = :version"
        " UNION ALL SELECT p.version, p.kind, p.parent_version, p.retired_at, line.distance - 1"
        "  FROM line JOIN policy_versions p ON p.version = line.parent_version WHERE line.distance > -:up)"
        " SELECT version, kind, parent_version, distance, retired_at IS NOT NULL FROM line"
    )
    rows = session.execute(query, {"version": version, "up": up})
    return [Kin(number, ProposerKind(kind), parent, at, retired) for number, kind, parent, at, retired in rows]


def _add_children(session: ReadSession, shown: dict[int, Kin], parents: Sequence[int], most: int) -> list[int]:
    """Put the children of these into ``shown``, and how many more there are into their parents; gives the new ones."""
    row, child = PolicyVersionRow, PolicyVersionRow.__table__.alias("child")
    has_heirs = select(child.c.version).where(child.c.parent_version == row.version).exists()
    same = row.parent_version
    ranked = (
        select(
            row.version,
            row.kind,
            row.parent_version,
            row.retired_at.is_not(None).label("retired"),
            func.row_number().over(partition_by=same, order_by=(has_heirs.desc(), row.version.desc())).label("place"),
            func.count().over(partition_by=same).label("many"),
        )
        .where(same.in_(parents), row.version.not_in(list(shown)))
        .subquery()
    )
    new = []
    for number, kind, parent, retired, many in session.execute(
        select(ranked.c.version, ranked.c.kind, ranked.c.parent_version, ranked.c.retired, ranked.c.many)
        .where(ranked.c.place <= most)
        .order_by(ranked.c.version)
    ):
        above = shown[parent]
        shown[parent] = Kin(above.version, above.kind, above.parent, above.distance, above.is_retired,
                            max(many - most, 0))  # fmt: skip
        shown[number] = Kin(number, ProposerKind(kind), parent, above.distance + 1, retired)
        new.append(number)
    return new
