"""What the learner took in, lineage as sets of ordinals, tenants' settings, retired versions, the cost of an attempt

Lineage that was kept as trace ids is carried over: every trace it names gets an ordinal.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from engine.store.members import Members

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None
COSTS = ("learn_cpu_s", "gate_cpu_s", "export_cpu_s")
AT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "learning_intake",
        sa.Column("ordinal", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("trace_id", sa.Uuid(), nullable=False),
        sa.Column("started_at", AT, nullable=False),
        sa.Column("written_at", AT, nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=True),
        sa.Column("traffic_class", sa.Text(), nullable=False),
        sa.Column("request_hash", sa.BigInteger(), nullable=False),
        sa.Column("held_out", sa.Boolean(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("max_tokens", sa.Integer(), nullable=False),
        sa.Column("forgotten_at", AT, nullable=True),
        sa.PrimaryKeyConstraint("ordinal", name=op.f("pk_learning_intake")),
        sa.UniqueConstraint("trace_id", name=op.f("uq_learning_intake_trace_id")),
    )
    op.create_index("ix_learning_intake_request_hash", "learning_intake", ["request_hash"])
    op.create_index("ix_learning_intake_tenant", "learning_intake", ["tenant"])
    op.create_index("ix_learning_intake_side_ordinal", "learning_intake", ["model", "held_out", "ordinal"])
    for name in ("position", "trace_id"):
        columns = ["model", "traffic_class", "held_out", name]
        op.create_index(f"ix_learning_intake_class_{name}", "learning_intake", columns)
    op.create_table(
        "tenant_settings",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("train", sa.Boolean(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("updated_at", AT, server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("tenant", name=op.f("pk_tenant_settings")),
    )
    op.add_column("policy_versions", sa.Column("retired_at", AT, nullable=True))
    op.add_column("policy_versions", sa.Column("retired_reason", sa.Text(), nullable=True))
    op.add_column("learning_attempts", sa.Column("through", sa.BigInteger(), server_default="0", nullable=False))
    for name in COSTS:
        op.add_column("learning_attempts", sa.Column(name, sa.Double(), server_default="0", nullable=False))
    _carry_over()
    op.create_index("ix_policy_lineage_chunks", "policy_lineage", ["chunks"], postgresql_using="gin")


def downgrade() -> None:
    op.add_column("policy_lineage", sa.Column("trace_ids", sa.ARRAY(sa.Uuid()), nullable=True))
    connection = op.get_bind()
    for version, role, chunks, bits in connection.execute(
        sa.text("SELECT version, role, chunks, bits FROM policy_lineage")
    ).all():
        connection.execute(
            sa.text(
                "UPDATE policy_lineage SET trace_ids = ARRAY(SELECT trace_id FROM learning_intake"
                " WHERE ordinal = ANY(:ordinals) ORDER BY ordinal) WHERE version = :version AND role = :role"
            ),
            {"ordinals": Members(tuple(chunks), bytes(bits)).ordinals(), "version": version, "role": role},
        )
    op.alter_column("policy_lineage", "trace_ids", nullable=False)
    op.drop_index("ix_policy_lineage_chunks", table_name="policy_lineage", postgresql_using="gin")
    op.drop_column("policy_lineage", "bits")
    op.drop_column("policy_lineage", "chunks")
    op.create_index("ix_policy_lineage_trace_ids", "policy_lineage", ["trace_ids"], postgresql_using="gin")
    for name in (*COSTS, "through"):
        op.drop_column("learning_attempts", name)
    op.drop_column("policy_versions", "retired_reason")
    op.drop_column("policy_versions", "retired_at")
    op.drop_table("tenant_settings")
    op.drop_table("learning_intake")


def _carry_over() -> None:
    """Ordinals for the traces that lineage names, as far as they are still there, then the sets instead of the ids.

    Their prompts were never hashed: the hash of the trace id stands in, which keeps each on the side it was on.
    """
    op.drop_index("ix_policy_lineage_trace_ids", table_name="policy_lineage", postgresql_using="gin")
    op.add_column("policy_lineage", sa.Column("chunks", postgresql.ARRAY(sa.BigInteger()), nullable=True))
    op.add_column("policy_lineage", sa.Column("bits", sa.LargeBinary(), nullable=True))
    connection = op.get_bind()
    connection.execute(
        sa.text(
            "INSERT INTO learning_intake SELECT row_number() OVER (ORDER BY t.written_at, t.trace_id), t.trace_id,"
            " t.started_at, t.written_at, t.model, t.tenant, t.traffic_class, hashtextextended(t.trace_id::text, 0),"
            " named.held_out, row_number() OVER (PARTITION BY t.model, t.traffic_class, named.held_out"
            " ORDER BY t.written_at, t.trace_id), t.max_tokens, NULL FROM traces t JOIN"
            " (SELECT unnest(trace_ids) AS trace_id, bool_and(role = 'gate') AS held_out FROM policy_lineage"
            " GROUP BY 1) named ON named.trace_id = t.trace_id"
        )
    )
    ordinals: dict[Any, int] = {
        i: n for n, i in connection.execute(sa.text("SELECT ordinal, trace_id FROM learning_intake"))
    }
    for version, role, ids in connection.execute(sa.text("SELECT version, role, trace_ids FROM policy_lineage")).all():
        members = Members.of(ordinals[trace_id] for trace_id in ids if trace_id in ordinals)
        connection.execute(
            sa.text(
                "UPDATE policy_lineage SET chunks = :chunks, bits = :bits WHERE version = :version AND role = :role"
            ),
            {"chunks": list(members.chunks), "bits": members.bits, "version": version, "role": role},
        )
    op.alter_column("policy_lineage", "chunks", nullable=False)
    op.alter_column("policy_lineage", "bits", nullable=False)
    op.drop_column("policy_lineage", "trace_ids")
