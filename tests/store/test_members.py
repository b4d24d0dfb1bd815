"""Sets of ordinals: exact both ways, small however far apart, and Postgres counts their bits the same way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, text

from engine.store.database import Database
from engine.store.members import CHUNK, Members, place

ORDINALS = st.sets(st.integers(0, 5_000_000), max_size=60)


@given(ORDINALS, ORDINALS)
def test_a_set_is_what_went_in(a: set[int], b: set[int]) -> None:
    one, two = Members.of(a), Members.of(b)
    assert one.ordinals() == sorted(a)
    assert len(one) == len(a)
    assert one.meets(two) == two.meets(one) == bool(a & b)
    assert len(one.bits) == len(one.chunks) * CHUNK // 8


def test_four_thousand_neighbours_cost_half_a_kilobyte() -> None:
    assert len(Members.of(range(4_000)).bits) == 512


def test_postgres_reads_the_same_bits(db: Database) -> None:
    ordinals = {0, 7, 8, 1_023, 1_024, 3_000_001}
    members = Members.of(ordinals)
    query = text("SELECT get_bit(CAST(:bits AS bytea), :at)")
    with db.read() as session:
        assert session.scalar(select(1)) == 1
        for ordinal in (*ordinals, 1, 9, 1_025, 3_000_002):
            chunk, bit = place(ordinal)
            at = members.chunks.index(chunk) * CHUNK + bit
            assert session.scalar(query, {"bits": members.bits, "at": at}) == (ordinal in ordinals)
