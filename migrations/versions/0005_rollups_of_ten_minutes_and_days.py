"""Rollups of ten minutes and of days; indexes under the list of traces: the slowest, and those that failed

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TIERS = ("ten_minutes", "day")
KEY = "at, policy_version, arm, traffic_class, replica_id"
REALS = ("draft_s", "verify_s", "decode_s")
SUMS = (
    *("requests", "errors", "cancelled", "retries", "preemptions", "good"),
    *("prompt_tokens", "output_tokens", "steps", "drafted", "accepted"),
)


def upgrade() -> None:
    for tier in TIERS:
        op.create_table(
            f"rollups_{tier}",
            *_key(),
            *(sa.Column(name, sa.BigInteger(), nullable=False) for name in SUMS),
            sa.Column("drafted_per_pos", postgresql.ARRAY(sa.BigInteger()), nullable=False),
            sa.Column("accepted_per_pos", postgresql.ARRAY(sa.BigInteger()), nullable=False),
            *(sa.Column(name, sa.Double(), nullable=False) for name in REALS),
            sa.PrimaryKeyConstraint(*(column.name for column in _key()), name=op.f(f"pk_rollups_{tier}")),
        )
        op.create_table(
            f"rollup_histograms_{tier}",
            sa.Column("metric", sa.Text(), nullable=False),
            *_key(),
            sa.Column("idx", postgresql.ARRAY(sa.SmallInteger()), nullable=False),
            sa.Column("cnt", postgresql.ARRAY(sa.Integer()), nullable=False),
            sa.PrimaryKeyConstraint(
                "metric", *(column.name for column in _key()), name=op.f(f"pk_rollup_histograms_{tier}")
            ),
        )
    # Minutes are kept for a month and hours for a year: each new tier is filled from the longest-lived one that can.
    for finer, tier, row in (("minute", "ten_minutes", "10 minutes"), ("hour", "day", "1 day")):
        op.execute(_fill_sums(finer, tier, row))
        op.execute(_fill_histograms(finer, tier, row))
    op.create_index("ix_traces_e2e", "traces", ["e2e_s"])
    op.create_index("ix_traces_failed", "traces", ["started_at"], postgresql_where=sa.text("status <> 'ok'"))


def downgrade() -> None:
    op.drop_index("ix_traces_failed", table_name="traces")
    op.drop_index("ix_traces_e2e", table_name="traces")
    for tier in reversed(TIERS):
        op.drop_table(f"rollup_histograms_{tier}")
        op.drop_table(f"rollups_{tier}")


def _fill_sums(finer: str, tier: str, row: str) -> str:
    totals = ", ".join([*(f"CAST(sum({n}) AS bigint) AS {n}" for n in SUMS), *(f"sum({n}) AS {n}" for n in REALS)])
    names = ", ".join((*SUMS, *REALS))
    source = f"(SELECT {_start(row)}, {KEY[4:]}, {names}, drafted_per_pos, accepted_per_pos FROM rollups_{finer}) AS s"
    return f"""
        INSERT INTO rollups_{tier} ({KEY}, {names}, drafted_per_pos, accepted_per_pos)
        SELECT {KEY}, {names}, coalesce(drafted_per_pos, '{{}}'), coalesce(accepted_per_pos, '{{}}')
        FROM (SELECT {KEY}, {totals} FROM {source} GROUP BY {KEY}) AS total
        LEFT JOIN (
            SELECT {KEY}, array_agg(d ORDER BY place) AS drafted_per_pos,
                array_agg(a ORDER BY place) AS accepted_per_pos
            FROM (
                SELECT {KEY}, place, CAST(sum(coalesce(d, 0)) AS bigint) AS d, CAST(sum(coalesce(a, 0)) AS bigint) AS a
                FROM {source}, unnest(drafted_per_pos, accepted_per_pos) WITH ORDINALITY AS p (d, a, place)
                GROUP BY {KEY}, place
            ) AS by_place GROUP BY {KEY}
        ) AS places USING ({KEY})"""


def _fill_histograms(finer: str, tier: str, row: str) -> str:
    source = f"(SELECT {_start(row)}, metric, {KEY[4:]}, idx, cnt FROM rollup_histograms_{finer}) AS s"
    return f"""
        INSERT INTO rollup_histograms_{tier} (metric, {KEY}, idx, cnt)
        SELECT metric, {KEY}, array_agg(bucket ORDER BY bucket), array_agg(n ORDER BY bucket) FROM (
            SELECT metric, {KEY}, bucket, CAST(sum(n) AS integer) AS n
            FROM {source}, unnest(idx, cnt) AS b (bucket, n) GROUP BY metric, {KEY}, bucket
        ) AS by_bucket GROUP BY metric, {KEY}"""


def _start(row: str) -> str:
    return f"date_bin(interval '{row}', at, timestamptz '2000-01-01 00:00:00Z') AS at"


def _key() -> list[sa.Column[object]]:
    return [
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=False),
        sa.Column("arm", sa.Text(), nullable=False),
        sa.Column("traffic_class", sa.Text(), nullable=False),
        sa.Column("replica_id", sa.Text(), nullable=False),
    ]
