"""A set of whole numbers as chunks and bits: which traces taught a version, in bytes instead of rows.

Ordinals are cut into chunks of 1,024; a set is its non-empty chunks, ascending, and 128 bytes of bits for each. So it
costs 128 bytes a chunk at most, however far apart its members lie, and an index over the chunks finds the sets of a
member. Bit i of a chunk is bit i % 8 of byte i // 8, as Postgres' ``get_bit`` counts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

CHUNK = 1_024
# numpy is imported where it is used: a rollback typed in an emergency reads this module and needs none of it.


@dataclass(frozen=True, slots=True)
class Members:
    """``bits`` holds ``CHUNK // 8`` bytes for each of ``chunks``."""

    chunks: tuple[int, ...]
    bits: bytes

    @classmethod
    def of(cls, ordinals: Iterable[int]) -> Members:
        """The set of these ordinals (>= 0), each once."""
        import numpy as np

        values = np.unique(np.fromiter(ordinals, np.int64))
        chunks, place = np.unique(values // CHUNK, return_inverse=True)
        flags = np.zeros((len(chunks), CHUNK), np.uint8)
        flags[place, values % CHUNK] = 1
        return cls(tuple(chunks.tolist()), np.packbits(flags, axis=1, bitorder="little").tobytes())

    def ordinals(self) -> list[int]:
        """Ascending."""
        import numpy as np

        flags = self._flags()
        place, offset = np.nonzero(flags)
        return (np.array(self.chunks, np.int64)[place] * CHUNK + offset).tolist()

    def __len__(self) -> int:
        return int(self._flags().sum())

    def meets(self, other: Members) -> bool:
        """Whether the two sets share a member."""
        mine = {chunk: n for n, chunk in enumerate(self.chunks)}
        size = CHUNK // 8
        for n, chunk in enumerate(other.chunks):
            if (m := mine.get(chunk)) is None:
                continue
            a = int.from_bytes(self.bits[m * size : (m + 1) * size], "little")
            if a & int.from_bytes(other.bits[n * size : (n + 1) * size], "little"):
                return True
        return False

    def _flags(self) -> np.ndarray:
        import numpy as np

        packed = np.frombuffer(self.bits, np.uint8).reshape(len(self.chunks), CHUNK // 8)
        return np.unpackbits(packed, axis=1, bitorder="little")


def place(ordinal: int) -> tuple[int, int]:
    """(chunk, bit in the chunk) of one ordinal."""
    return divmod(ordinal, CHUNK)


def union(sets: Sequence[Members]) -> Members:
    return Members.of(ordinal for one in sets for ordinal in one.ordinals())
