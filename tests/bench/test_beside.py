"""Traces beside an engine: none is lost, one that is lost is seen, and blocks are compared within their round."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.bench.beside import MADE, NOTHING, WRITTEN, Load, alternate, load_figures, ratios
from engine.bench.blocks import Run
from engine.settings import TelemetrySettings
from engine.store.database import Database
from engine.store.repositories import audit, rollups
from engine.telemetry.spill import Spill
from engine.telemetry.writer import TraceWriter
from tests.bench.test_store import loses_every_tenth
from tests.waiting import until

ROUNDS = 3


class Watched(Load):
    """Knows what is beside at the moment, and keeps order."""

    def beside(self, kind: str, work: Callable[[], None]) -> None:
        self.kinds = [*getattr(self, "kinds", []), kind]
        Load.beside(self, kind, work)


def measured(db: Database, folder: Path) -> tuple[Watched, list[dict[str, Run]], dict[str, float]]:
    """Rounds whose blocks end when traces were offered, whatever the time; half as much is answered beside them."""
    writer = TraceWriter(db, Spill(folder, 10**8), TelemetrySettings())
    writer.start()
    waiting = list[int]()
    load, answered = Watched(db, writer, 2_000, np.random.default_rng(0)), [0]

    def wait(_: float) -> None:
        goal = len(load.offered) + 20
        until(lambda: load.kinds[-1] != WRITTEN or len(load.offered) >= goal, "traces are offered")
        answered[0] += 10 if load.kinds[-1] == WRITTEN else 20

    def read() -> int:
        with db.read() as session:
            waiting.append(rollups.freshness(session).waiting)
        return answered[0]

    blocks = alternate(load, read, ROUNDS, random.Random(1), lambda line: None, wait)
    writer.close()
    assert set(waiting) == {0}, "a block begins and is counted when nothing is left to write or to compact"
    return load, blocks, {figure.name: figure.value for figure in load_figures(db, load)}


def test_every_trace_that_was_offered_is_counted(db: Database, tmp_path: Path) -> None:
    load, _, found = measured(db, tmp_path)
    assert found["beside_lost"] == 0
    assert found["beside_per_s"] > 0
    with db.read() as session:
        assert audit.traces(session) == len(load.offered) >= 20 * ROUNDS


def test_a_trace_that_is_lost_is_seen(db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TraceWriter, "submit", loses_every_tenth(TraceWriter.submit))
    assert measured(db, tmp_path)[2]["beside_lost"] > 0


def test_a_block_that_leaves_its_compaction_to_the_next_is_seen(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Load, "_drain", lambda self: self.writer.flush(60.0))
    with pytest.raises(AssertionError, match="nothing is left"):
        measured(db, tmp_path)


def test_blocks_are_compared_within_their_round(db: Database, tmp_path: Path) -> None:
    load, blocks, _ = measured(db, tmp_path)
    rounds = [load.kinds[at : at + 3] for at in range(0, 3 * ROUNDS, 3)]
    assert all(sorted(kinds) == [MADE, NOTHING, WRITTEN] for kinds in rounds)
    assert len(set(map(tuple, rounds))) > 1, "in random order"
    assert [{kind: run.tokens for kind, run in runs.items()} for runs in blocks] == [
        {NOTHING: 20, MADE: 20, WRITTEN: 10}
    ] * ROUNDS
    even = [{kind: replace(run, seconds=1.0) for kind, run in runs.items()} for runs in blocks]
    for figure in ratios(even, np.random.default_rng(0)):
        assert (figure.value, figure.low, figure.high, figure.n) == (0.5, 0.5, 0.5, ROUNDS)
