from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from engine.bench import telemetry_cost
from engine.bench.telemetry_cost import SLICE_S, pair, steady_load
from engine.contracts import SlipstreamError


class World:
    """A server of forty tokens in a step of 0.05 s; while traces are written, and a little after, a tenth slower.

    ``stopped``: it puts nothing out.
    """

    def __init__(self, stopped: bool = False) -> None:
        self.now, self.next_step, self.busy_until, self.stopped = 0.0, 0.0, 0.0, stopped
        self.service, self.engine = SimpleNamespace(telemetry=True), SimpleNamespace(output_tokens=0)
        self.seen: list[bool] = []

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        if seconds == SLICE_S:
            self.seen.append(self.service.telemetry)
        self.now += seconds
        while self.next_step <= self.now and not self.stopped:
            self.engine.output_tokens += 40
            if self.service.telemetry:
                self.busy_until = self.next_step + 0.25
            self.next_step += 0.055 if self.next_step <= self.busy_until else 0.05


def rates(world: World, settle_s: float, pairs: int = 8) -> list[tuple[float, float]]:
    """Tokens per second (on, off) of so many pairs."""
    server: Any = world
    order, found = random.Random(0), []
    for _ in range(pairs):
        on, off = pair(server, settle_s, order, world.clock, world.wait)
        assert world.service.telemetry
        found.append((on.tokens / on.seconds, off.tokens / off.seconds))
    return found


def test_slices_with_and_without_do_not_pay_for_each_other_and_hold_whole_steps() -> None:
    world = World()
    for on, off in rates(world, 0.3):
        assert on == pytest.approx(40 / 0.055, rel=0.002)  # a slice of 36 steps: a part of one more would be 0.02
        assert off == pytest.approx(40 / 0.05, rel=0.002)
    pairs = {tuple(world.seen[i : i + 2]) for i in range(0, 16, 2)}
    assert pairs == {(True, False), (False, True)}


def test_without_settling_a_slice_would_pay_for_the_one_before() -> None:
    assert min(off for _, off in rates(World(), 0.0)) < 0.993 * 40 / 0.05


def test_slices_cut_within_a_step_would_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = lambda server, clock, wait: (clock(), server.engine.output_tokens)  # noqa: E731
    monkeypatch.setattr(telemetry_cost, "step_end", cut)
    assert any(abs(on / (40 / 0.055) - 1) > 0.01 for on, _ in rates(World(), 0.31))


def test_a_server_that_puts_nothing_out_is_an_error() -> None:
    with pytest.raises(SlipstreamError, match="no token"):
        rates(World(stopped=True), 0.3, pairs=1)


def test_a_client_that_fails_is_an_error() -> None:
    class Broken:
        def ask(self, http: Any, text: str, tokens: int) -> int:
            raise ValueError("no answer")

    client: Any = Broken()
    with pytest.raises(ValueError, match="no answer"), steady_load(client, "hello"):
        pass
