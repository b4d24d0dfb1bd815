from __future__ import annotations

import random

import pytest

from engine.scheduler.errors import QueueFull, RequestTooLong
from engine.scheduler.queue import MOST_IDLE, OUTPUT_WEIGHT
from engine.scheduler.scheduler import ScheduledStep, Scheduler
from engine.scheduler.sequence import NO_SLOT, Sequence


def scheduler(**options: int) -> Scheduler:
    return Scheduler(**({"max_num_seqs": 4, "max_model_len": 64, "prefill_chunk": 8, "max_queue": 8} | options))


def seq(name: str, prompt: int = 5, max_tokens: int = 4, client: str = "") -> Sequence:
    return Sequence(name, range(prompt), max_tokens, client)


def run(step: ScheduledStep) -> None:
    """What the runner does to a sequence, in integers."""
    for chunk in step.prefills:
        chunk.seq.num_computed += chunk.count
        if chunk.gives_first_token:
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
    assert s.waiting.keys() == {"fits"}


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


@pytest.mark.parametrize("kv_tokens", [None, 320, 176])
def test_any_order_of_events_keeps_the_slots_whole_and_starves_nobody(kv_tokens: int | None) -> None:
    rng = random.Random(0)
    s = scheduler(max_queue=50, kv_tokens=kv_tokens, max_model_len=160)
    added, finished = 0, 0
    for _ in range(6_000):
        event = rng.random()
        if event < 0.3 and added < 300:
            try:
                s.add(seq(str(added), rng.randint(1, 40), rng.randint(1, 90), rng.choice("xyz")))
                added += 1
            except QueueFull:
                pass
        elif event < 0.35 and s.has_work:
            finished += s.finish(rng.choice([*sorted(s.waiting.keys()), *s.running])) is not None
        else:
            step = s.schedule()
            assert sum(c.count for c in step.prefills) <= s.max_prefill_tokens
            assert s.blocks_in_use <= s.num_blocks
            run(step)
            for done in [q for q in s.running.values() if q.num_output and q.remaining == 0]:
                finished += s.finish(done.request_id) is not None
        s.check_integrity()
    while s.has_work:
        run(s.schedule())
        for done in [q for q in s.running.values() if q.num_output and q.remaining == 0]:
            finished += s.finish(done.request_id) is not None
    assert finished == added > 100
    assert (s.preemptions > 0) == (kv_tokens is not None)


def test_the_youngest_gives_way_and_is_computed_again_with_its_output() -> None:
    s = scheduler(max_model_len=128, kv_tokens=12 * 16, prefill_chunk=64, max_prefill_tokens=64)
    for name in "ab":
        s.add(seq(name, 20, 100))
    while not s.preemptions:
        run(s.schedule())
        s.check_integrity()
    assert list(s.running) == ["a"]
    (away,) = s.waiting.values()
    tokens = list(away.token_ids)
    assert (away.request_id, away.preemptions, away.slot) == ("b", 1, NO_SLOT)
    assert away.num_output > 30
    s.finish("a")
    step = s.schedule()
    assert chunks(step) == [("b", 0, len(tokens) - 1)]
    assert not step.prefills[0].gives_first_token  # it has that long since
    run(step)
    assert away.token_ids == tokens
    assert [d.request_id for d in s.schedule().decodes] == ["b"]
    s.check_integrity()


def test_who_gave_way_pays_for_his_prompt_once() -> None:
    s = scheduler(max_model_len=128, kv_tokens=12 * 16, prefill_chunk=64, max_prefill_tokens=64)
    for name in "ab":
        s.add(seq(name, 20, 100, client=name))
    while s.preemptions < 1 or s.has_work:
        run(s.schedule())
        for one in [one for one in s.running.values() if not one.remaining]:
            served = dict(s.waiting._served)
            s.finish(one.request_id)
    assert s.preemptions
    assert served == {"a": 20 + OUTPUT_WEIGHT * 100, "b": 20}, "b's output is charged when it ends"


def test_what_the_whole_cache_cannot_hold_is_refused() -> None:
    s = scheduler(max_model_len=128, kv_tokens=64)
    with pytest.raises(RequestTooLong, match="holds 64"):
        s.add(seq("x", 40, 40))
    s.add(seq("y", 40, 24))


def test_one_client_with_many_requests_does_not_hold_up_another() -> None:
    s = scheduler(max_num_seqs=1, max_queue=50)
    for i in range(20):
        s.add(seq(f"many-{i}", client="many"))
    served = []
    for turn in range(8):
        if turn == 2:
            s.add(seq("few-0", client="few"))
            s.add(seq("few-1", client="few"))
        while not s.running:
            run(s.schedule())
        (name,) = s.running
        while s.running[name].remaining:
            run(s.schedule())
        s.finish(name)
        served.append(name)
    assert served[2:6] == ["few-0", "many-2", "few-1", "many-3"] or served[2:6] == [
        "many-2",
        "few-0",
        "many-3",
        "few-1",
    ]
    assert [name for name in served if name.startswith("many")] == [f"many-{i}" for i in range(6)]


def test_who_comes_back_after_a_pause_has_saved_nothing_up() -> None:
    s = scheduler(max_num_seqs=1, max_queue=50)
    for i in range(10):
        s.add(seq(f"busy-{i}", client="busy"))
    for _ in range(5):
        run(s.schedule())
        (name,) = s.running
        s.finish(name)
    for i in range(5):
        s.add(seq(f"new-{i}", client="new"))
    order = []
    for _ in range(6):
        s.schedule()
        (name,) = s.running
        order.append(name.split("-")[0])
        s.finish(name)
    assert order.count("new") == order.count("busy") == 3


def test_a_newcomer_is_not_served_before_one_that_never_stopped() -> None:
    """A steady client runs and nobody waits when another comes; then both have more than there is room for."""
    s = scheduler(max_num_seqs=2, max_queue=100)
    for i in range(50):
        s.add(seq(f"{i}", client="steady"))
        s.schedule()
        if i:
            s.finish(f"{i - 1}")
    for i in range(30):
        for client in ("new", "steady"):
            s.add(seq(f"{client}-{i}", client=client))
    s.schedule()
    order = []
    for _ in range(20):
        first = next(iter(s.running))
        s.finish(first)
        s.schedule()
        order.append(next(reversed(s.running.values())).client)
    assert order.count("new") == order.count("steady") == 10


def test_counters_of_clients_that_went_are_bounded_and_end_with_the_work() -> None:
    s = scheduler(max_num_seqs=1)
    for i in range(3 * MOST_IDLE):  # somebody always waits
        s.add(seq(f"{i}", client=f"{i}"))
        s.schedule()
        if i:
            s.finish(f"{i - 1}")
        assert len(s.waiting._served) <= MOST_IDLE + 3
    s.schedule()
    s.finish(f"{i}")
    assert not s.has_work
    assert not s.waiting._served


def test_blocks_are_counted_while_sequences_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gauges are asked for from other threads than the engine's."""
    s = scheduler()
    for name in "ab":
        s.add(seq(name))
    s.schedule()
    blocks = s._blocks

    def meanwhile(one: Sequence) -> int:
        s.running.pop("a", None)
        return blocks(one)

    monkeypatch.setattr(s, "_blocks", meanwhile)
    assert s.blocks_in_use == 2
