"""Which policy versions may be served. The ledger asks, so the statements are written out as its own are."""

from __future__ import annotations

from collections.abc import Collection

from engine.store.connection import Reads


def unknown(session: Reads, versions: Collection[int]) -> list[int]:
    """Which of these are no versions at all, ascending."""
    found = session.rows("SELECT version FROM policy_versions WHERE version = ANY(%(of)s)", of=list(versions))
    return sorted(set(versions) - {row.version for row in found})


def retired(session: Reads, versions: Collection[int]) -> list[int]:
    """Which of these shall not be served again, ascending."""
    found = session.rows(
        "SELECT version FROM policy_versions WHERE version = ANY(%(of)s) AND retired_at IS NOT NULL ORDER BY version",
        of=list(versions),
    )
    return [row.version for row in found]


def standing(session: Reads, version: int, fallback: int, without: Collection[int] = frozenset()) -> int:
    """The version itself or its nearest ancestor that may be served: not retired, and none of ``without``.

    The fallback where there is none; it is always allowed, so that something is.
    """
    at: int | None = version
    while at is not None and at != fallback:
        found = session.rows(
            "SELECT parent_version, retired_at IS NOT NULL AS is_retired FROM policy_versions WHERE version = %(at)s",
            at=at,
        )
        if not found:
            break
        if not found[0].is_retired and at not in without:
            return at
        at = found[0].parent_version
    return fallback


def rolled_back(session: Reads) -> set[int]:
    """Versions whose newest rollout took them back."""
    found = session.rows(
        "SELECT DISTINCT ON (canary) canary, state FROM rollouts ORDER BY canary, id DESC",
    )
    return {row.canary for row in found if row.state in ("ROLLING_BACK", "ROLLED_BACK")}
