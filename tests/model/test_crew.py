"""Threads come and go with the processors there are for them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from engine.model.crew import LONGEST_S, SHORTEST_S, WINDOW_S, Crew

PASSES = 5
"""Of a window."""


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def crew_of(most: int, appointed: list[int] | None = None) -> tuple[Crew, Clock]:
    clock = Clock()
    return Crew(most, [].append if appointed is None else appointed.append, clock), clock


def one_pass(crew: Crew, clock: Clock, processors: float, wall_s: float) -> int:
    """The threads it had."""
    crew.muster()
    had = crew.threads
    clock.now_s += wall_s
    crew.observe(min(had, processors) * wall_s, wall_s)
    return had


def work(crew: Crew, clock: Clock, processors: float, seconds: float) -> list[int]:
    """Threads of each pass of so many seconds on a machine that has so many processors for them."""
    return [one_pass(crew, clock, processors, WINDOW_S / PASSES) for _ in range(round(seconds * PASSES / WINDOW_S))]


def test_all_threads_work_while_all_have_a_processor() -> None:
    appointed: list[int] = []
    assert set(work(*crew_of(4, appointed), 4.0, 5.0)) == {4}
    assert not appointed


@pytest.mark.parametrize(("processors", "threads"), [(1.0, 1), (1.5, 1), (1.7, 2), (2.9, 3), (3.5, 3), (0.4, 1)])
def test_those_without_a_processor_are_dismissed(processors: float, threads: int) -> None:
    appointed: list[int] = []
    had = work(*crew_of(4, appointed), processors, 2 * WINDOW_S)
    assert had == [4] * PASSES + [threads] * PASSES
    assert appointed == [threads]


def test_all_are_tried_again_and_less_often_while_that_is_in_vain() -> None:
    crew, clock = crew_of(2)
    had = work(crew, clock, 1.0, 100.0)
    begun = [i for i, (before, after) in enumerate(pairwise(had)) if (before, after) == (1, 2)]
    pauses = [(later - sooner) * WINDOW_S / PASSES - WINDOW_S for sooner, later in pairwise(begun)]
    assert pauses[:3] == pytest.approx([2 * SHORTEST_S, 4 * SHORTEST_S, 8 * SHORTEST_S], abs=0.021)
    assert pauses[-1] == pytest.approx(LONGEST_S, abs=0.021)
    assert had.count(2) < 0.06 * len(had)


def test_when_the_others_are_gone_all_work_again() -> None:
    crew, clock = crew_of(2)
    work(crew, clock, 1.0, 100.0)
    had = work(crew, clock, 2.0, LONGEST_S + 1.0)
    assert set(had[-PASSES:]) == {2}
    had = work(crew, clock, 1.0, WINDOW_S + SHORTEST_S + WINDOW_S / PASSES)
    assert had[-1] == 2  # and are soon tried after a new loss


def test_a_pause_is_waited_for_as_well() -> None:
    """Who was in the way a while ago says nothing of a request that comes now."""
    crew, clock = crew_of(2)
    work(crew, clock, 1.0, 100.0)
    clock.now_s += LONGEST_S
    assert one_pass(crew, clock, 2.0, 0.3) == 2


def test_a_try_is_judged_by_its_own_passes() -> None:
    crew, clock = crew_of(2)
    work(crew, clock, 1.0, WINDOW_S + SHORTEST_S - WINDOW_S / PASSES)  # nearly a window with one thread
    clock.now_s += 2 * WINDOW_S / PASSES
    assert set(work(crew, clock, 2.0, 3 * WINDOW_S)) == {2}


def test_only_a_try_is_a_try() -> None:
    """Who loses one more afterwards has not tried in vain."""
    crew, clock = crew_of(4)
    work(crew, clock, 3.0, WINDOW_S)
    assert work(crew, clock, 2.0, SHORTEST_S)[-1] == 3
    clock.now_s += 0.001
    assert one_pass(crew, clock, 4.0, 0.001) == 4


def test_a_short_loss_dismisses_nobody() -> None:
    """As when requests come together: their texts are read and their tokens sent by other threads meanwhile."""
    crew, clock = crew_of(2)
    for _ in range(10):
        for _ in range(10):
            one_pass(crew, clock, 2.0, 0.009)
        for wall_s in (0.017, 0.023):
            one_pass(crew, clock, 0.6, wall_s)
        assert one_pass(crew, clock, 2.0, 0.14) == 2  # their prompts


def test_one_thread_is_never_judged() -> None:
    appointed: list[int] = []
    assert set(work(*crew_of(1, appointed), 0.1, 2.0)) == {1}
    assert not appointed
