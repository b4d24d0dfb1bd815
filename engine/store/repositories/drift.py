"""What drift is looked for in, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np
from sqlalchemy import delete, select, text, update

from engine.store.database import ReadSession, WriteSession
from engine.store.models import DriftFindingRow

BINNED = {
    "prompt length": "least(width_bucket(ln(greatest(prompt_tokens, 1)), 0, 9, 12), 12)",
    "output length": "least(width_bucket(ln(greatest(output_tokens, 1)), 0, 9, 12), 12)",
    "class mix": "traffic_class",
    "tenant mix": "coalesce(tenant, '–')",
}
"""Quantity → SQL of the bin of a request. Lengths fall into twelve bins, each 2.1 times as wide as the one before."""
TOKENS, TOKEN_BINS = "prompt tokens", 32
SAMPLED = 400
"""Prompts of a class whose tokens are looked at in a window: of all together, a rare class would have too few."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A row of ``drift_findings``; see the model for its fields."""

    kind: str
    quantity: str
    traffic_class: str | None
    policy_version: int | None
    since: datetime
    until: datetime
    reference_since: datetime
    reference_until: datetime
    effect: float
    statistic: float
    threshold: float
    requests: int
    detail: str

    @property
    def key(self) -> tuple[str, str, str | None, int | None]:
        return self.kind, self.quantity, self.traffic_class, self.policy_version


def binned(session: ReadSession, quantity: str, since: datetime, until: datetime) -> dict[str, dict[str, float]]:
    """class → bin → requests that ended well; mixes are under the class ""."""
    if quantity == TOKENS:
        return _tokens(session, since, until)
    of = "''" if quantity.endswith("mix") else "traffic_class"
    query = f"""
        SELECT {of}, {BINNED[quantity]}, count(*) FROM traces
        WHERE started_at >= :since AND started_at < :until AND status = 'ok' GROUP BY 1, 2"""
    found: dict[str, dict[str, float]] = {}
    for traffic_class, place, n in session.execute(text(query), {"since": since, "until": until}):
        found.setdefault(traffic_class, {})[str(place)] = float(n)
    return found


def _tokens(session: ReadSession, since: datetime, until: datetime) -> dict[str, dict[str, float]]:
    """class → bin of token ids → requests' worth of prompt tokens, of the newest prompts.

    The tokens of one prompt belong together, so a prompt counts as one request, spread over its tokens.
    """
    query = f"""
        WITH chosen AS (
            SELECT newest.traffic_class, prompt_ids FROM (
                SELECT traffic_class, started_at, trace_id,
                    row_number() OVER (PARTITION BY traffic_class ORDER BY started_at DESC) AS place
                FROM traces WHERE started_at >= :since AND started_at < :until AND status = 'ok'
            ) AS newest JOIN trace_payloads USING (started_at, trace_id)
            WHERE place <= {SAMPLED} AND cardinality(prompt_ids) > 0
        )
        SELECT traffic_class, mod(hashint4(token) & 2147483647, {TOKEN_BINS}),
            sum(1.0 / cardinality(prompt_ids)) FROM chosen, unnest(prompt_ids) AS token GROUP BY 1, 2"""
    found: dict[str, dict[str, float]] = {}
    for traffic_class, place, n in session.execute(text(query), {"since": since, "until": until}):
        found.setdefault(traffic_class, {})[str(place)] = float(n)
    return found


def acceptance(
    session: ReadSession, version: int, since: datetime, until: datetime, first: int, newest: int = 50_000
) -> tuple[np.ndarray, np.ndarray, list[datetime]]:
    """Accepted tokens per step, class, and start of the ``first`` and of the ``newest`` requests of a version in the
    window, in order, each once."""
    some = """
        SELECT accepted / CAST(steps AS float8) AS value, traffic_class, started_at, trace_id FROM traces
        WHERE policy_version = :version AND started_at >= :since AND started_at < :until AND status = 'ok' AND steps > 0
        ORDER BY started_at"""
    query = f"({some}, trace_id LIMIT :first) UNION ({some} DESC, trace_id DESC LIMIT :newest) ORDER BY 3, 4"
    values = {"version": version, "since": since, "until": until, "first": first, "newest": newest}
    rows = session.execute(text(query), values).all()
    return (
        np.array([row[0] for row in rows], dtype=float),
        np.array([row[1] for row in rows], dtype=object),
        [row[2] for row in rows],
    )


def record(session: WriteSession, found: Sequence[Finding], now: datetime) -> list[DriftFindingRow]:
    """Bring the table up to date: what is found and open is refreshed, what is new is added, what is gone is ended.

    Gives the rows that are new.
    """
    still = {row_key(row): row for row in session.scalars(select(DriftFindingRow).where(_open()))}
    fresh = []
    for finding in found:
        row = still.pop(finding.key, None)
        if row is None:
            row = DriftFindingRow(found_at=now, seen_at=now, ended_at=None, **asdict(finding))
            session.add(row)
            fresh.append(row)
            continue
        row.seen_at = now
        for name in ("until", "effect", "statistic", "threshold", "requests", "detail"):
            setattr(row, name, getattr(finding, name))
    gone = [row.id for row in still.values()]
    session.execute(update(DriftFindingRow).where(DriftFindingRow.id.in_(gone)).values(ended_at=now))
    session.flush()
    return fresh


def forget(session: WriteSession, before: datetime) -> None:
    """Delete the findings that ended before; what is still true stays, however old."""
    session.execute(delete(DriftFindingRow).where(DriftFindingRow.ended_at < before))


def row_key(row: DriftFindingRow) -> tuple[str, str, str | None, int | None]:
    return row.kind, row.quantity, row.traffic_class, row.policy_version


def findings(session: ReadSession, since: datetime, until: datetime, limit: int = 500) -> list[dict[str, Any]]:
    """Findings that were true at some time in the window, open ones first, newest first."""
    query = (
        select(DriftFindingRow)
        .where(DriftFindingRow.found_at < until, _open() | (DriftFindingRow.ended_at >= since))
        .order_by(DriftFindingRow.ended_at.is_not(None), DriftFindingRow.found_at.desc())
        .limit(limit)
    )
    columns = [column.name for column in DriftFindingRow.__table__.columns]
    return [{name: getattr(row, name) for name in columns} for row in session.scalars(query)]


def _open() -> Any:
    return DriftFindingRow.ended_at.is_(None)
