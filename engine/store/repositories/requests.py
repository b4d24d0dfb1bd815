"""Requests of a window as columns, for statistics: a sample, each with the load it met.

A long window costs what its sample and its rollups cost: how many there are and what load they met is in the rollups,
and the sample is a range of trace ids, which are random and have an index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np
from sqlalchemy import text

from engine.store.database import ReadSession
from engine.store.repositories import overview
from engine.store.repositories.overview import MINUTE, ORIGIN, Slice


@dataclass(frozen=True, slots=True)
class Requests:
    """Columns [requests] of requests that ended well. Seconds; nan where there is no value.

    ``in_flight`` is how many requests were at work on the replica in that minute, on average (Little's law: seconds of
    service begun in the minute / 60). ``share`` is the share of the window's requests that was taken.
    """

    trace_id: list[UUID]
    traffic_class: np.ndarray
    policy_version: np.ndarray
    conversation: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    steps: np.ndarray
    accepted: np.ndarray
    ttft_s: np.ndarray
    tpot_s: np.ndarray
    e2e_s: np.ndarray
    in_flight: np.ndarray
    share: float

    def __len__(self) -> int:
        return len(self.trace_id)


_COLUMNS = (
    *("trace_id", "traffic_class", "policy_version", "assignment_key"),
    *("prompt_tokens", "output_tokens", "steps", "accepted", "ttft_s", "tpot_s", "e2e_s", "in_flight"),
)


_MINUTE = "date_trunc('minute', started_at, 'UTC')"
_LOAD = f"""
    minutes AS (
        SELECT replica_id AS of, at AS minute, sum(e2e_s) AS service_s FROM (
            SELECT at, replica_id, e2e_s FROM rollups_minute WHERE at >= :first AND at < :until
            UNION ALL SELECT at, replica_id, e2e_s FROM rollup_deltas WHERE at >= :first AND at < :until
        ) AS rollup GROUP BY 1, 2
    ), raw AS (
        SELECT replica_id AS of, {_MINUTE} AS minute, sum(e2e_s) AS service_s FROM traces
        WHERE started_at >= (SELECT min(minute) FROM minutes WHERE service_s = 'NaN')
            AND started_at < (SELECT max(minute) + interval '1 minute' FROM minutes WHERE service_s = 'NaN')
        GROUP BY 1, 2
    ), load AS (
        SELECT of, minute, CASE minutes.service_s WHEN 'NaN' THEN raw.service_s ELSE minutes.service_s END / 60
            AS in_flight
        FROM minutes LEFT JOIN raw USING (of, minute)
    )"""
"""Requests in flight by replica and minute. Traces are read of the time only that a rollup does not know (NaN)."""
_DRAWN = "trace_id < :beyond"
"""Requests by themselves, not whole conversations: a key with many requests weighs as much as they do, and those of it
that are drawn are still resampled together."""


def sample(session: ReadSession, part: Slice, limit: int = 20_000) -> Requests:
    """About ``limit`` requests at most, all where there are no more, each as likely as any other; always the same ones.

    They are those of the lowest trace ids, which tell nothing of a request: they are drawn at random when it arrives.
    """
    total = answered(session, part)
    where, values = _conditions(part)
    share = min(1.0, limit / total) if total else 1.0
    if share < 1.0:
        where += f" AND {_DRAWN}"
        values["beyond"] = UUID(int=int(share * 2**128))
    values["first"] = part.since - (part.since - ORIGIN) % MINUTE
    query = f"""
        WITH {_LOAD}
        SELECT {", ".join(_COLUMNS)} FROM traces JOIN load ON of = replica_id AND minute = {_MINUTE} WHERE {where}"""
    rows = session.execute(text(query), values).all()
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(_COLUMNS)
    prompt, output, steps, accepted, ttft, tpot, e2e, in_flight = (np.array(c, dtype=float) for c in columns[4:])
    return Requests(
        list(columns[0]),
        np.array(columns[1], dtype=object),
        np.array(columns[2], dtype=int),
        np.array(columns[3], dtype=object),
        prompt,
        output,
        steps,
        accepted,
        ttft,
        tpot,
        e2e,
        in_flight,
        share,
    )


def answered(session: ReadSession, part: Slice) -> int:
    """How many requests of a window ended well: whole minutes by the rollups, its ends by the traces."""
    whole, ends = overview.with_traces(session, part).by_minutes()
    # Each of them has a place in the histogram of this duration, and nothing else does.
    counted = int(overview.grouped(session, whole, "e2e").table.counts.sum()) if whole is not None else 0
    for end in ends:
        where, values = _conditions(end)
        counted += session.scalar(text(f"SELECT count(*) FROM traces WHERE {where}"), values) or 0
    return counted


def _conditions(part: Slice) -> tuple[str, dict[str, Any]]:
    """SQL of what of the traces is in a slice and ended well, and its values."""
    values: dict[str, Any] = {"since": part.since, "until": part.until}
    where = "started_at >= :since AND started_at < :until AND status = 'ok'"
    for name, value in (
        ("traffic_class", part.traffic_class),
        ("arm", part.arm),
        ("policy_version", part.version),
        ("replica_id", part.replica),
    ):
        if value is not None:
            where += f" AND {name} = :{name}"
            values[name] = value
    if part.versions is not None:
        where += " AND policy_version = ANY(:versions)"
        values["versions"] = list(part.versions)
    return where, values
