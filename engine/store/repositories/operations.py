"""What changing drafts costs the people who run them, week by week: the price beside the gain."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import text

from engine.store.database import ReadSession, WriteSession

WEEK = timedelta(weeks=1)


@dataclass(frozen=True, slots=True)
class Week:
    """One week (from Monday, UTC). ``changes`` are rollouts that reached traffic, ``failed`` those rolled back.

    ``detect_s``: median from the first canary traffic to the first failing verdict; ``restore_s``: median from there
    until no replica could route to the canary; both of rolled-back rollouts that a guard failed. ``interventions`` are
    what people asked of rollouts and wrote into the ledger themselves.
    """

    week: datetime
    changes: int
    ended: int
    failed: int
    detect_s: float | None
    restore_s: float | None
    canary_hours: float
    interventions: int

    @property
    def failure_rate(self) -> float | None:
        return self.failed / self.ended if self.ended else None


_WEEKS = text(
    """
    WITH decided AS (
        SELECT rollout_id, min(decided_at) FILTER (WHERE verdict = 'FAIL') AS failed,
            min(decided_at) FILTER (WHERE action IN ('roll_back', 'promote')) AS left_traffic,
            min(decided_at) FILTER (WHERE to_state IN ('ROLLED_BACK', 'INCONCLUSIVE', 'DONE')) AS ended
        FROM rollout_decisions GROUP BY rollout_id
    ), change AS (
        SELECT CAST(status -> 'stages' -> 0 ->> 'began' AS timestamptz) AS began, state, d.*
        FROM rollouts LEFT JOIN decided d ON d.rollout_id = rollouts.id
        WHERE jsonb_array_length(coalesce(status -> 'stages', '[]')) > 0
    ), by_week AS (
        SELECT date_trunc('week', began, 'UTC') AS week, count(*) AS changes,
            count(*) FILTER (WHERE state IN ('ROLLED_BACK', 'INCONCLUSIVE', 'DONE')) AS ended,
            count(*) FILTER (WHERE state = 'ROLLED_BACK') AS failed,
            percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM failed - began))
                FILTER (WHERE state = 'ROLLED_BACK') AS detect_s,
            percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM ended - failed))
                FILTER (WHERE state = 'ROLLED_BACK') AS restore_s,
            sum(extract(epoch FROM coalesce(left_traffic, ended, CAST(:now AS timestamptz)) - began)) / 3600
                AS canary_hours
        FROM change GROUP BY 1
    ), acted AS (
        SELECT created_at FROM rollout_commands
        UNION ALL SELECT created_at FROM serving_plans
        WHERE actor NOT IN ('engine', 'learner') AND actor NOT LIKE 'rollout %'
    ), asked AS (SELECT date_trunc('week', created_at, 'UTC') AS week, count(*) AS n FROM acted GROUP BY 1)
    SELECT coalesce(b.week, a.week) AS week, coalesce(changes, 0), coalesce(ended, 0), coalesce(failed, 0), detect_s,
        restore_s, coalesce(canary_hours, 0), coalesce(a.n, 0)
    FROM by_week b FULL JOIN asked a ON a.week = b.week
    WHERE coalesce(b.week, a.week) >= :since ORDER BY 1
    """
)


def weeks(session: ReadSession | WriteSession, since: datetime, now: datetime) -> list[Week]:
    """Oldest first; weeks in which nothing happened are left out."""
    rows = session.execute(_WEEKS, {"since": since, "now": now})
    return [
        Week(
            week,
            int(changes),
            int(ended),
            int(failed),
            float(detect) if detect is not None else None,
            float(restore) if restore is not None else None,
            float(hours),
            int(asked),
        )
        for week, changes, ended, failed, detect, restore, hours, asked in rows
    ]
