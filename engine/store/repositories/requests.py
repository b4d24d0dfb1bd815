"""Requests of a window as columns, for statistics: a sample of conversations, each with the load it met."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import numpy as np
from sqlalchemy import text

from engine.store.database import ReadSession
from engine.store.repositories.overview import Slice


@dataclass(frozen=True, slots=True)
class Requests:
    """Columns [requests] of requests that ended well. Seconds; nan where there is no value.

    ``in_flight`` is how many requests were at work on the replica in that minute, on average (Little's law: seconds of
    service begun in the minute / 60). ``share`` is the share of the window's conversations that was taken.
    """

    trace_id: list[UUID]
    started_at: list[datetime]
    traffic_class: np.ndarray
    policy_version: np.ndarray
    conversation: np.ndarray
    tenant: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    steps: np.ndarray
    accepted: np.ndarray
    queue_s: np.ndarray
    ttft_s: np.ndarray
    tpot_s: np.ndarray
    e2e_s: np.ndarray
    in_flight: np.ndarray
    share: float

    def __len__(self) -> int:
        return len(self.trace_id)


_COLUMNS = (
    *("trace_id", "started_at", "traffic_class", "policy_version", "assignment_key", "coalesce(tenant, '')"),
    *("prompt_tokens", "output_tokens", "steps", "accepted", "queue_s", "ttft_s", "tpot_s", "e2e_s"),
)


def sample(session: ReadSession, part: Slice, limit: int = 20_000, total: int | None = None) -> Requests:
    """About ``limit`` requests at most: whole conversations, chosen by a hash of their key, so always the same ones.

    ``total`` is how many the window has where the caller knows; it is counted otherwise.
    """
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
    if total is None:
        total = session.scalar(text(f"SELECT count(*) FROM traces WHERE {where}"), values) or 0
    share = min(1.0, limit / total) if total else 1.0
    if share < 1.0:
        where += " AND mod(hashtext(assignment_key) & 2147483647, 100000) < :part"
        values["part"] = max(int(share * 100_000), 1)
    query = f"""
        WITH load AS (
            SELECT replica_id AS of, date_trunc('minute', started_at) AS minute, sum(e2e_s) / 60 AS in_flight
            FROM traces WHERE started_at >= :since AND started_at < :until GROUP BY 1, 2
        )
        SELECT {", ".join(_COLUMNS)}, in_flight FROM traces
        JOIN load ON of = replica_id AND minute = date_trunc('minute', started_at) WHERE {where}"""
    rows = session.execute(text(query), values).all()
    columns = list(zip(*rows, strict=True)) if rows else [()] * (len(_COLUMNS) + 1)
    numbers = [np.array(column, dtype=float) for column in columns[6:]]
    prompt, output, steps, accepted, queue, ttft, tpot, e2e, in_flight = numbers
    return Requests(
        list(columns[0]),
        list(columns[1]),
        np.array(columns[2], dtype=object),
        np.array(columns[3], dtype=int),
        np.array(columns[4], dtype=object),
        np.array(columns[5], dtype=object),
        prompt,
        output,
        steps,
        accepted,
        queue,
        ttft,
        tpot,
        e2e,
        in_flight,
        share,
    )
