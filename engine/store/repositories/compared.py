"""Counting a rollout's compared requests: each once, behind a cursor, so that a tick costs what came since the last.

What a key came to so far is a row of its own, for the next request of that key changes all of it (``store.segments``).
Totals, keys and cursors move in one transaction: whoever counts next goes on where the last one ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import delete, exists, text

from engine.store.database import ReadSession, WriteSession
from engine.store.models import ComparedKeyRow, ComparisonRow
from engine.store.repositories.export import settled_before
from engine.store.segments import KEY_COUNTS, METRICS, Keys, KeySums, Request, Tally

SETTLES = timedelta(seconds=10)
"""A transaction that writes for longer keeps what comes after its start from being counted, which is then said."""
LIMIT = 20_000
"""Requests that one call counts: about a second. What is left waits for the next."""
_BEGINNING = (datetime(1, 1, 1, tzinfo=UTC), UUID(int=0))


@dataclass(frozen=True, slots=True)
class Window:
    """One stage of a rollout: its ledger generation, when it began, since when its requests count (warm-up over)."""

    generation: int
    began: datetime
    counts_from: datetime


_NEXT = text(
    """
    SELECT arm, hashtextextended(assignment_key, 0), generation, traffic_class, status, retry, steps, accepted,
        draft_errors, e2e_s, ttft_s, tpot_s, nullif(cost_s, 0) / nullif(steps + accepted, 0), written_at, trace_id
    FROM traces
    WHERE generation = :generation AND started_at >= CAST(:counts_from AS timestamptz) - interval '1 day'
      AND written_at - make_interval(secs => coalesce(e2e_s, 0)) >= :counts_from
      AND arm IN ('canary', 'control') AND status <> 'rejected'
      AND written_at >= :written_at AND (written_at, trace_id) > (:written_at, :trace_id) AND written_at < :before
    ORDER BY written_at, trace_id LIMIT :limit
    """
)
"""Keys are hashed: two of a million share one of 2^64 values with odds of 3e-8.

When a request began is reckoned back from when it was written, by the database's clock, as the stage is: a replica
whose clock is an hour behind must not hide its canary's errors for an hour. ``started_at`` only says which partitions
to read.
"""

_KNOWN = text(
    """
    SELECT arm, key, traffic_class, requests, cancelled, errors, draft_errors, timeouts, retries, x, y, latencies
    FROM compared_keys WHERE comparison = :comparison AND key = ANY(:keys)
    """
)

_KEEP = text(
    """
    INSERT INTO compared_keys (
        comparison, arm, key, traffic_class, requests, cancelled, errors, draft_errors, timeouts, retries, x, y,
        latencies)
    SELECT :comparison, arm, key, traffic_class, requests, cancelled, errors, draft_errors, timeouts, retries, x, y,
        CAST(latencies AS integer[])
    FROM unnest(
        CAST(:arm AS text[]), CAST(:key AS bigint[]), CAST(:traffic_class AS text[]), CAST(:requests AS integer[]),
        CAST(:cancelled AS integer[]), CAST(:errors AS integer[]), CAST(:draft_errors AS integer[]),
        CAST(:timeouts AS integer[]), CAST(:retries AS integer[]),
        CAST(:x AS bigint[]), CAST(:y AS bigint[]), CAST(:latencies AS text[])
    ) AS fresh(arm, key, traffic_class, requests, cancelled, errors, draft_errors, timeouts, retries, x, y, latencies)
    ON CONFLICT (comparison, key, arm, traffic_class) DO UPDATE SET
        requests = excluded.requests, cancelled = excluded.cancelled, errors = excluded.errors,
        draft_errors = excluded.draft_errors, timeouts = excluded.timeouts, retries = excluded.retries,
        x = excluded.x, y = excluded.y, latencies = excluded.latencies
    """
)

_FORGET = text(
    """
    DELETE FROM compared_keys WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM compared_keys WHERE comparison < :before LIMIT :limit))
    """
)


def take_in(session: WriteSession, windows: Sequence[Window], now: datetime, limit: int = LIMIT) -> datetime | None:
    """Count the next ``limit`` requests of a rollout's stages, oldest first; stages may be added from call to call.

    Requests count that were written before ``now`` (by the database's clock) and by no transaction that is still open.
    None when that is all up to now, otherwise the instant up to which it is.
    """
    comparison = windows[0].generation
    row = session.get(ComparisonRow, comparison, with_for_update=True)
    if row is None:
        row = ComparisonRow(generation=comparison, cursors={}, totals=[])
        session.add(row)
    tally, cursors = Tally.from_json(row.totals), dict(row.cursors)
    before, fresh = settled_before(session, now), list[Request]()
    reached = before if now - before > SETTLES else None
    for window in windows:
        at, trace_id = _position(cursors.get(str(window.generation)))
        wanted = limit - len(fresh)
        asked = {"generation": window.generation, "counts_from": window.counts_from, "limit": wanted}
        found = session.execute(_NEXT, asked | {"written_at": at, "trace_id": trace_id, "before": before}).all()
        fresh += [_request(*row) for row in found]
        full = len(found) == wanted
        end = (found[-1].written_at, found[-1].trace_id) if full and found else (max(before, at), UUID(int=0))
        cursors[str(window.generation)] = [end[0].isoformat(), str(end[1])]
        if full:
            reached = end[0]
            break
    row.cursors = cursors
    if fresh:
        keys = _known(session, comparison, sorted({int(str(r.key)) for r in fresh}))
        _keep(session, comparison, keys, sorted(tally.take(fresh, keys), key=str))
        row.totals = tally.to_json()
    return reached


def tally(session: ReadSession | WriteSession, comparison: int) -> Tally:
    """What has been counted of the rollout whose first stage had this generation."""
    row = session.get(ComparisonRow, comparison)
    return Tally.from_json(row.totals if row is not None else ())


def forget(session: WriteSession, before: int | None, limit: int = LIMIT) -> None:
    """Delete up to ``limit`` keys of comparisons before this one (None: of all); decisions hold what they came to.

    The totals go with the last key: keys without them would be counted again.
    """
    end = before if before is not None else 2**63 - 1
    session.execute(_FORGET, {"before": end, "limit": limit})
    keys_left = exists().where(ComparedKeyRow.comparison == ComparisonRow.generation)
    session.execute(delete(ComparisonRow).where(ComparisonRow.generation < end, ~keys_left))


def _position(cursor: Sequence[str] | None) -> tuple[datetime, UUID]:
    return (datetime.fromisoformat(cursor[0]), UUID(cursor[1])) if cursor else _BEGINNING


def _request(
    arm: str,
    key: int,
    generation: int,
    name: str,
    status: str,
    retry: int,
    steps: int,
    accepted: int,
    draft_errors: int,
    *rest: Any,
) -> Request:
    return Request(arm, key, generation, name, status, retry, steps, accepted, rest[: len(METRICS)], draft_errors)


def _known(session: WriteSession, comparison: int, hashes: Sequence[int]) -> Keys:
    keys: Keys = {}
    for arm, key, name, *counts, flat in session.execute(_KNOWN, {"comparison": comparison, "keys": hashes}):
        triples = zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        latencies = {(metric, bucket): requests for metric, bucket, requests in triples}
        sums = keys.setdefault((arm, key), {})[name] = KeySums(*counts)
        sums.latencies = latencies
    return keys


def _keep(session: WriteSession, comparison: int, keys: Keys, changed: Sequence[tuple[str, Any, str]]) -> None:
    columns: dict[str, list[Any]] = {name: [] for name in ("arm", "key", "traffic_class", *KEY_COUNTS, "latencies")}
    for arm, key, name in changed:
        sums = keys[arm, key][name]
        for column, value in (("arm", arm), ("key", key), ("traffic_class", name)):
            columns[column].append(value)
        for column in KEY_COUNTS:
            columns[column].append(getattr(sums, column))
        flat = ",".join(f"{metric},{bucket},{n}" for (metric, bucket), n in sums.latencies.items())
        columns["latencies"].append(f"{{{flat}}}")
    session.execute(_KEEP, {"comparison": comparison} | columns)
