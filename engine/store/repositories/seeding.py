"""Made-up traces in the millions, set-based, for benchmarks of the store. Never used on a database that serves."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime

from sqlalchemy import text

from engine.contracts import ProposerKind
from engine.store.database import WriteSession
from engine.store.repositories import partitions, policies, rollups

CLASSES = ("chat", "code", "long_form", "batch")
NEWEST = 8
"""The newest version that made-up requests of thirty days name."""


def add_day(
    session: WriteSession,
    day: date,
    number: int,
    traces: int,
    until: datetime,
    seed: float,
    since: datetime | None = None,
) -> None:
    """``traces`` requests of one UTC day, of which those that begin in [since, until) are kept; ``number`` counts the
    days from 0.

    More by day than by night; four classes with their own lengths; a new champion every five days, before that two days
    of a canary with its control at 10 % each; two replicas; some errors and retries; a queue that grows with the load.
    ``seed`` in [-1, 1]. They come to what the day has already, in a table beside that takes its partition's place:
    indexes of a full table are made in a fifth of the time that each row takes to find its places in them.
    """
    values = {"day": day, "number": number, "traces": traces, "since": since, "until": until}
    _fill(session, day, _DAY, values, seed)


def add_compared(session: WriteSession, day: date, generation: int, requests: int, seed: float) -> None:
    """``requests`` evenly over one UTC day, canary and control in equal parts, four to a key, written as they end."""
    _fill(session, day, _COMPARED, {"day": day, "generation": generation, "requests": requests}, seed)


def _fill(session: WriteSession, day: date, statement: str, values: Mapping[str, object], seed: float) -> None:
    partitions.ensure(session, day)
    there, beside = partitions.name("traces", day), f"traces_seeding_{day:%Y%m%d}"
    session.execute(text("SELECT setseed(:seed)"), {"seed": seed})
    session.execute(text("SET LOCAL lock_timeout = '10min'"))  # the day before may be rolled up at the moment
    session.execute(text("SET LOCAL maintenance_work_mem = '256MB'"))
    session.execute(text(partitions.create_beside("traces", beside)))
    session.execute(text(f"INSERT INTO {beside} SELECT * FROM {there}"))
    session.execute(text(statement.format(table=beside)), values)
    rollups.take_turn(session)  # who rebuilds meanwhile would look at the day before the change, and find it empty
    session.execute(text(f"DROP TABLE {there}"))
    session.execute(text(f"ALTER TABLE {beside} RENAME TO {there}"))
    session.execute(text(partitions.attach("traces", day)))


def add_versions(session: WriteSession, newest: int) -> None:
    """Learned versions up to this number, each the child of the one before: those that the made-up requests name."""
    while (made := max(policies.numbers(session), default=0)) < newest:
        policies.register(
            session,
            digest=f"seeded {made + 1}",
            kind=ProposerKind.TRACE_MEMORY,
            num_speculative_tokens=4,
            manifest={"kind": ProposerKind.TRACE_MEMORY.value},
            parent_version=made or None,
            note="made up for a benchmark",
        )


def analyze(session: WriteSession) -> None:
    """Statistics for the planner, which autovacuum would gather by and by."""
    session.execute(text("ANALYZE"))


_DAY = """
    INSERT INTO {table} (
        started_at, trace_id, request_id, replica_id, policy_version, arm, generation, traffic_class, tenant,
        assignment_key, status, finish_reason, error, model, endpoint, stream, temperature, max_tokens, queue_s, ttft_s,
        tpot_s, e2e_s, prompt_tokens, output_tokens, steps, drafted, accepted, drafted_per_pos, accepted_per_pos,
        prefill_s, draft_s, verify_s, other_s, cost_s, plain_s, expected_accepted, expected_plain_s,
        expected_cost_s, retry, preemptions, draft_errors, trainable, written_at)
    SELECT at, gen_random_uuid(), 'r' || g, 'replica-' || g % 2, version, arm, 1 + CAST(:number AS integer), class,
        CASE g % 3 WHEN 0 THEN 'acme' WHEN 1 THEN 'globex' END, 'c' || g / 4, status,
        CASE status WHEN 'ok' THEN 'stop' END, CASE status WHEN 'error' THEN 'planted' END, 'seeded',
        '/v1/chat/completions', true, 0, 1024, queue_s, queue_s + prefill_s,
        decode_s / greatest(output_tokens - 1, 1), queue_s + prefill_s + decode_s, prompt_tokens, output_tokens, steps,
        4 * steps, accepted, ARRAY[steps, steps, steps, steps],
        ARRAY[accepted / 2, accepted / 4, accepted / 8, accepted - accepted / 2 - accepted / 4 - accepted / 8],
        prefill_s, 0.06 * decode_s, 0.92 * decode_s, 0.02 * decode_s, 0.5 * decode_s, 0.6 * decode_s,
        accepted, 0.65 * decode_s, 0.5 * decode_s, CAST(r_retry < 0.01 AS integer),
        CAST(load > 1.4 AND r_status > 0.98 AS integer), 0, true,
        at + make_interval(secs => queue_s + prefill_s + decode_s + 0.3)
    FROM (
        SELECT *, 0.004 * load * exp(random_normal(0, 1)) AS queue_s,
            (0.02 + 0.0005 * prompt_tokens) * exp(random_normal(0, 0.2)) AS prefill_s,
            steps * 0.02 * (0.8 + 0.3 * load) * exp(random_normal(0, 0.15)) AS decode_s
        FROM (
            SELECT *, CAST(ceil(output_tokens / length) AS integer) AS steps,
                CAST(floor(ceil(output_tokens / length) * (length - 1)) AS integer) AS accepted
            FROM (
                SELECT *, 1.25 + 0.07 * (version - 2) + CASE class WHEN 'code' THEN 0.3 WHEN 'batch' THEN 0.1 ELSE 0 END
                        + abs(random_normal(0, 0.12)) AS length,
                    CASE WHEN r_status < 0.004 THEN 'error' WHEN r_status < 0.006 THEN 'cancelled' ELSE 'ok' END
                        AS status,
                    1 + CAST(exp(random_normal(CASE class WHEN 'long_form' THEN 7 WHEN 'code' THEN 5.5 ELSE 4.5 END,
                        0.6)) AS integer) AS prompt_tokens,
                    2 + CAST(exp(random_normal(CASE class WHEN 'long_form' THEN 5.5 WHEN 'batch' THEN 5 ELSE 4 END,
                        0.5)) AS integer) AS output_tokens
                FROM (
                    SELECT g, r_status, r_retry, load, day_start + make_interval(secs => 86400 * place) AS at,
                        CASE WHEN r_class < 0.45 THEN 'chat' WHEN r_class < 0.75 THEN 'code'
                            WHEN r_class < 0.9 THEN 'long_form' ELSE 'batch' END AS class,
                        CASE WHEN :number % 5 >= 3 AND r_arm < 0.1 THEN 'canary'
                            WHEN :number % 5 >= 3 AND r_arm < 0.2 THEN 'control' ELSE 'champion' END AS arm,
                        2 + :number / 5 + CAST(:number % 5 >= 3 AND r_arm < 0.1 AS integer) AS version
                    FROM (
                        SELECT g, r_class, r_arm, r_status, r_retry, CAST(:day AS timestamp) AT TIME ZONE 'UTC'
                            AS day_start, u - 0.08 * sin(2 * pi() * u) AS place, 1 + 0.6 * sin(2 * pi() * u) AS load
                        FROM (
                            SELECT g, random() AS u, random() AS r_class, random() AS r_arm, random() AS r_status,
                                random() AS r_retry
                            FROM generate_series(1, CAST(:traces AS integer)) AS g
                        ) AS drawn
                    ) AS placed
                ) AS assigned
                WHERE at < :until AND at >= coalesce(CAST(:since AS timestamptz), '-infinity')
            ) AS sized
        ) AS stepped
    ) AS timed
"""

_COMPARED = """
    INSERT INTO {table} (
        started_at, trace_id, request_id, replica_id, policy_version, arm, generation, traffic_class, assignment_key,
        status, model, endpoint, stream, temperature, max_tokens, queue_s, ttft_s, tpot_s, e2e_s, prompt_tokens,
        output_tokens, steps, drafted, accepted, drafted_per_pos, accepted_per_pos, prefill_s, draft_s, verify_s,
        other_s, cost_s, plain_s, expected_accepted, retry, preemptions, draft_errors,
        trainable, written_at)
    SELECT at, gen_random_uuid(), 'r' || g, 'replica-0', 2 + g / 4 % 2, CASE g / 4 % 2 WHEN 0 THEN 'control' ELSE
            'canary' END, :generation, class, 'c' || g / 4, CASE WHEN r_status < 0.005 THEN 'error' ELSE 'ok' END,
        'seeded', '/v1/chat/completions', true, 0, 1024, 0, 0.1 * e2e_s, 0.02 * e2e_s, e2e_s, 100,
        steps + accepted, steps, 4 * steps, accepted, ARRAY[steps], ARRAY[accepted], 0, 0, e2e_s, 0, 0.02 * steps, 0,
        accepted,
        CAST(r_status < 0.01 AS integer), 0, 0, true, at + make_interval(secs => e2e_s)
    FROM (
        SELECT *, CAST(steps * (0.2 + 0.8 * r_accepted) AS integer) AS accepted
        FROM (
            SELECT g, random() AS r_status, random() AS r_accepted, exp(random_normal(0, 0.5)) AS e2e_s,
                10 + CAST(50 * random() AS integer) AS steps,
                (ARRAY['chat', 'code', 'long_form', 'batch'])[1 + g / 8 % 4] AS class,
                CAST(:day AS timestamp) AT TIME ZONE 'UTC'
                    + make_interval(secs => 86390.0 * g / CAST(:requests AS integer)) AS at
            FROM generate_series(0, CAST(:requests AS integer) - 1) AS g
        ) AS drawn
    ) AS sized
"""
