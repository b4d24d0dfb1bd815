"""Keys of Postgres' advisory locks. They share one space of numbers: written down together, no two are the same."""

from __future__ import annotations

LEDGER, PARTITIONS, COMPACTOR, INTAKE, ROLLOUTS, COMMANDS, DECISIONS = range(0x51195_0001, 0x51195_0008)
"""In turn: generations are handed out one at a time; two writers that meet the same new day wait for each other; one
compacts or rebuilds the rollups; ordinals of traces are contiguous; two launches must not both find nothing active;
commands and decisions become visible in the order of their ids, for their readers follow them behind a cursor."""
