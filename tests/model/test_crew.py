"""Threads come and go with the processors there are for them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from engine.model import crew
from engine.model.crew import LONGEST, SHORTEST, Crew


def work(one: Crew, processors: float, windows: int) -> list[int]:
    """Threads of each of so many windows on a machine that has so many processors for them."""
    had = []
    for _ in range(windows):
        had.append(one.threads)
        for _ in range(4):  # passes
            one.observe(min(one.threads, processors) * crew.WINDOW_S / 4, crew.WINDOW_S / 4)
    return had


def test_all_threads_work_while_all_have_a_processor() -> None:
    appointed: list[int] = []
    assert set(work(Crew(4, appointed.append), 4.0, 50)) == {4}
    assert not appointed


@pytest.mark.parametrize(("processors", "threads"), [(1.0, 1), (1.5, 1), (1.7, 2), (2.9, 3), (3.5, 3), (0.4, 1)])
def test_those_without_a_processor_are_dismissed(processors: float, threads: int) -> None:
    appointed: list[int] = []
    one = Crew(4, appointed.append)
    assert work(one, processors, 2) == [4, threads]
    assert appointed[0] == threads


def test_all_are_tried_again_and_less_often_while_that_is_in_vain() -> None:
    one = Crew(2, lambda threads: None)
    had = work(one, 1.0, 5_000)
    tries = [i for i, threads in enumerate(had) if threads == 2]
    pauses = [later - sooner - 1 for sooner, later in pairwise(tries)]
    assert pauses[:4] == [SHORTEST, 2 * SHORTEST, 4 * SHORTEST, 8 * SHORTEST]
    assert pauses[-1] == LONGEST
    assert len(tries) < 50


def test_when_the_others_are_gone_all_work_again() -> None:
    one = Crew(2, lambda threads: None)
    work(one, 1.0, 5_000)
    had = work(one, 2.0, LONGEST + 100)
    assert set(had[LONGEST + 1 :]) == {2}
    assert work(one, 1.0, SHORTEST + 3)[1 : SHORTEST + 2] == [1] * SHORTEST + [2]  # and are soon tried after a new loss


def test_a_short_loss_dismisses_nobody() -> None:
    """As when requests come together: their texts are read and their tokens sent by other threads meanwhile."""
    one = Crew(2, lambda threads: pytest.fail("dismissed"))
    for _ in range(10):
        for _ in range(10):
            one.observe(0.018, 0.009)
        for wall_s in (0.017, 0.023):
            one.observe(0.6 * wall_s, wall_s)
        one.observe(0.28, 0.14)  # their prompts


def test_one_thread_is_never_judged() -> None:
    one = Crew(1, lambda threads: pytest.fail("appointed"))
    assert work(one, 0.1, 10) == [1] * 10
