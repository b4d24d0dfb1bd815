"""Rests between the pieces of an attempt, by processor time that is made up."""

from __future__ import annotations

import pytest

from engine.learner.pace import LONGEST_S, PIECE_S, Pace, Stopped


class Worker:
    def __init__(self, share: float) -> None:
        self.used = self.rested = 0.0
        self.told, self.stops_after = 0, 1e9
        self.pace = Pace(share, self.pause, lambda: self.used, lambda: self.rested > self.stops_after)

    def pause(self, seconds: float) -> None:
        assert 0 < seconds <= LONGEST_S
        self.rested += seconds

    def alive(self) -> None:
        self.told += 1

    def work(self, seconds: float) -> None:
        self.used += seconds
        self.pace.rest(self.alive)


def test_work_takes_its_share_of_the_time_in_every_part_of_it() -> None:
    worker = Worker(0.1)
    for _ in range(200):
        worker.work(0.0015)
        assert worker.rested >= 9 * (worker.used - PIECE_S)  # never far behind
    assert worker.rested == pytest.approx(9 * worker.used)
    whole = Worker(1.0)
    whole.work(10.0)
    assert whole.rested == 0.0


def test_a_long_rest_is_interrupted_to_say_that_the_attempt_lives() -> None:
    worker = Worker(0.25)
    worker.work(10.0)
    assert worker.rested == pytest.approx(30.0)
    assert worker.told == 30


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_an_attempt_ends_in_its_rest_when_the_process_shall(share: float) -> None:
    """The planted fault: rests ended at once instead, and the attempt went on at full speed until it was killed."""
    worker = Worker(share)
    worker.work(1.0)
    worker.stops_after = worker.rested - 0.1
    with pytest.raises(Stopped):
        worker.work(0.0)
    worker.stops_after = worker.rested + 0.5 if share < 1 else -1.0
    before = worker.rested
    with pytest.raises(Stopped):
        worker.work(100.0)
    assert worker.rested - before <= LONGEST_S


def test_what_was_done_before_an_attempt_is_not_rested_for() -> None:
    worker = Worker(0.5)
    worker.used = 100.0
    worker.pace.begin()
    worker.work(1.0)
    assert worker.rested == pytest.approx(1.0)
