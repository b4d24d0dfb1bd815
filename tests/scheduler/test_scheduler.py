from __future__ import annotations

import random

import pytest

from engine.scheduler.errors import QueueFull, RequestTooLong
from engine.scheduler.scheduler import ScheduledStep, Scheduler
from engine.scheduler.sequence import NO_SLOT, Sequence


def scheduler(**options: int) -> Scheduler:
    return Scheduler(**({"max_num_seqs": 4, "max_model_len": 64, "prefill_chunk": 8, "max_queue": 8} | options))


def seq(name: str, prompt: int = 5, max_tokens: int = 4) -> Sequence:
    return Sequence(name, range(prompt), max_tokens)


def run(step: ScheduledStep) -> None:
    """What the runner does to a sequence, in integers."""
    for chunk in step.prefills:
        chunk.seq.num_computed += chunk.count
        if chunk.is_last:
            chunk.seq.token_ids.append(0)
    for decoding in step.decodes:
        decoding.token_ids.append(0)
        decoding.num_computed = len(decoding.token_ids) - 1


def chunks(step: ScheduledStep) -> list[tuple[str, int, int]]:
    return [(c.seq.request_id, c.start, c.count) for c in step.prefills]


def test_first_come_first_served_lowest_slot_first() -> None:
    s = scheduler(max_prefill_tokens=64)
    for name in "abcde":
        s.add(seq(name))
    assert chunks(s.schedule()) == [(name, 0, 5) for name in "abcd"]
    assert [s.running[name].slot for name in "abcd"] == [0, 1, 2, 3]
    s.finish("b")
    s.schedule()
    assert s.running["e"].slot == 1
    s.check_integrity()


def test_long_prompts_come_in_chunks_beside_decodes() -> None:
    s = scheduler(max_prefill_tokens=8)
    s.add(seq("short", 3, 20))
    run(s.schedule())
    s.add(seq("long", 20))
    seen = []
    for _ in range(3):
        step = s.schedule()
        assert [d.request_id for d in step.decodes] == ["short"]
        seen += chunks(step)
        run(step)
        s.check_integrity()
    assert seen == [("long", 0, 8), ("long", 8, 8), ("long", 16, 4)]
    assert [d.request_id for d in s.schedule().decodes] == ["short", "long"]


def test_the_budget_covers_all_prompts_of_a_step() -> None:
    s = scheduler(max_prefill_tokens=10)
    for name in "abc":
        s.add(seq(name, 7))
    step = s.schedule()
    assert chunks(step) == [("a", 0, 7), ("b", 0, 3)]
    run(step)
    assert chunks(s.schedule()) == [("b", 3, 4), ("c", 0, 6)]


def test_what_never_fits_is_refused_and_a_full_queue_says_so() -> None:
    s = scheduler(max_queue=1)
    for prompt, max_tokens in ((60, 5), (0, 5), (5, 0)):
        with pytest.raises(RequestTooLong):
            s.add(seq("x", prompt, max_tokens))
    s.add(seq("fits", 60, 4))
    with pytest.raises(QueueFull):
        s.add(seq("y"))
    assert list(s.waiting) == ["fits"]


def test_finish_frees_at_once_wherever_a_sequence_is() -> None:
    s = scheduler(max_num_seqs=1)
    s.add(seq("a"))
    s.add(seq("b"))
    s.schedule()
    assert s.finish("b") is not None
    assert s.finish("a").slot == NO_SLOT  # type: ignore[union-attr]
    assert s.finish("a") is None
    assert not s.has_work
    s.check_integrity()


def test_any_order_of_events_keeps_the_slots_whole_and_starves_nobody() -> None:
    rng = random.Random(0)
    s = scheduler(max_queue=50)
    added, finished = 0, 0
    for _ in range(2_000):
        event = rng.random()
        if event < 0.3 and added < 300:
            try:
                s.add(seq(str(added), rng.randint(1, 40), rng.randint(1, 20)))
                added += 1
            except QueueFull:
                pass
        elif event < 0.35 and s.has_work:
            finished += s.finish(rng.choice([*s.waiting, *s.running])) is not None
        else:
            step = s.schedule()
            assert sum(c.count for c in step.prefills) <= s.max_prefill_tokens
            run(step)
            for done in [q for q in s.running.values() if q.num_output and q.remaining == 0]:
                finished += s.finish(done.request_id) is not None
        s.check_integrity()
    while s.has_work:
        run(s.schedule())
        for done in [q for q in s.running.values() if q.num_output and q.remaining == 0]:
            finished += s.finish(done.request_id) is not None
    assert finished == added > 100
