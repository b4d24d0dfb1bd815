from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from engine.bench.blocks import Run
from engine.bench.telemetry_cost import pair
from engine.contracts import SlipstreamError


class Writer:
    """Holds what was served with telemetry on until it is flushed."""

    def __init__(self, works: bool = True) -> None:
        self.pending, self.works = 0, works

    def flush(self, timeout_s: float) -> bool:
        self.pending = 0
        return self.works

    def stats(self) -> dict[str, Any]:
        return {"queue": self.pending}


def test_a_block_does_not_pay_for_the_traces_of_the_one_before() -> None:
    writer, order = Writer(), random.Random(0)
    server: Any = SimpleNamespace(writer=writer, service=SimpleNamespace(telemetry=True))
    seen = list[tuple[bool, int]]()

    def serve(part: Any) -> Run:
        seen.append((server.service.telemetry, writer.pending))
        writer.pending += len(part) * server.service.telemetry
        return Run(len(part), 1.0 + server.service.telemetry)

    pairs = [pair(server, ["a", "b"], serve, order) for _ in range(8)]
    assert {(on.seconds, off.seconds) for on, off in pairs} == {(2.0, 1.0)}
    assert [pending for _, pending in seen] == [0] * 16
    assert {tuple(on for on, _ in seen[i : i + 2]) for i in range(0, 16, 2)} == {(True, False), (False, True)}


def test_traces_that_are_never_written_are_an_error() -> None:
    server: Any = SimpleNamespace(writer=Writer(works=False), service=SimpleNamespace(telemetry=True))
    with pytest.raises(SlipstreamError, match="were not written"):
        pair(server, ["a"], lambda part: Run(1, 1.0), random.Random(0))
