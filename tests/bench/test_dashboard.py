"""What `bench dashboard` makes of its measurements, and its viewers, who read what a server sends them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from websockets.sync.server import ServerConnection, serve

from app.components.context import CHART_STEP_S
from engine.bench import paired
from engine.bench import viewers as viewers_module
from engine.bench.dashboard import Watched, watched_figures
from engine.bench.pages import Look, Rerun, There, figures, warm_ms
from engine.bench.viewers import CYCLE_S, Recording, Viewers, cycle_of
from engine.contracts import SlipstreamError
from tests.waiting import until

RECORDED = Recording("/x", (b"open", b"sized"), ((b"again",), (b"again", b"rest")), answer=len(b"drawn"))


def test_the_dearest_page_is_the_one_that_is_reported() -> None:
    looks = [
        Look("a 1h", There(0.5, 1.2, 2.0), [90.0, 110.0], [40.0, 60.0]),
        Look("b 1h", There(0.6, 9.0, 9.5), [150.0, 170.0], [30.0, 50.0]),
        Look("b 30d", There(0.4, 0.5, 3.0), [], [70.0, 90.0]),
    ]
    found = {figure.name: figure for figure in figures(looks, np.random.default_rng(0))}
    warm, refreshed, paint = (
        found[name] for name in ("page_warm_cpu_ms_max", "page_refresh_cpu_ms_max", "first_paint_s_p95")
    )
    assert (warm.value, warm.n) == (80.0, 2)
    assert (refreshed.value, refreshed.n) == (160.0, 2)
    assert warm.low <= warm.value <= warm.high
    assert (paint.value, paint.n) == (pytest.approx(np.quantile([1.2, 9.0, 0.5], 0.95)), 3)
    assert found["main_panel_s_p95"].value == pytest.approx(np.quantile([2.0, 9.5, 3.0], 0.95))
    assert found["first_contentful_paint_s_p95"].value == pytest.approx(np.quantile([0.5, 0.6, 0.4], 0.95))


def test_a_rerun_is_warm_after_one_that_asked_in_the_same_step() -> None:
    asked, warm, over, late, again = (
        Rerun(300, 1, 1),
        Rerun(100, 1, 1),
        Rerun(101, 1, 2),
        Rerun(302, 2, 2),
        Rerun(102, 2, 2),
    )
    assert warm_ms([asked, warm, over, late, again]) == [100, 102]
    assert warm_ms([Rerun(300, 1, 2), Rerun(301, 2, 2)]) == [], "what it asked was of the step before"
    assert warm_ms([]) == []


def test_the_ratio_is_of_the_pages_and_not_of_the_machine() -> None:
    rng, pairs = np.random.default_rng(1), []
    for _ in range(12):
        seconds = rng.uniform(0.8, 1.5) * rng.lognormal(0, 0.3, 24)
        pairs.append((list(1.1 * seconds), list(seconds)))
    p95, _ = paired.ratios("20_pages/none", pairs, (0.95, 0.5), rng)
    assert (p95.name, p95.value) == ("ratio:p95:20_pages/none", pytest.approx(1.1))
    assert p95.low <= 1.1 <= p95.high


def test_what_open_pages_take_is_over_all_blocks_with_an_interval_that_is_theirs() -> None:
    blocks = [Watched(refreshed=80, due=100.0, cpu_s=3.0, seconds=10.0), Watched(100, 100.0, 9.0, 20.0)]
    refreshed, cores = watched_figures(blocks, np.random.default_rng(0))
    assert (refreshed.value, refreshed.low, refreshed.high, refreshed.n) == (0.9, 0.8, 1.0, 2)
    assert (cores.value, cores.low, cores.high) == pytest.approx((0.4, 0.3, 0.45))


@contextmanager
def server(answers: bool, drawn: bytes = b"drawn") -> Iterator[tuple[str, list[bytes | str]]]:
    """A dashboard's socket: what it is sent, and whether it says anything to the third message and later ones."""
    heard = list[bytes | str]()

    def talk(socket: ServerConnection) -> None:
        for frame in socket:
            heard.append(frame)
            if answers or len(heard) < 3:
                socket.send(drawn)

    with serve(talk, "127.0.0.1", 0, subprotocols=["streamlit"]) as running:  # type: ignore[list-item]
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.socket.getsockname()[1]}", heard
        running.shutdown()
        thread.join()


def test_viewers_open_a_page_once_and_draw_it_again_while_they_are_active() -> None:
    with server(answers=True) as (address, heard):
        viewers = Viewers(address, [RECORDED], refresh_s=0.05)
        viewers.start()
        viewers.wait_open()
        assert len(heard) == 2
        viewers.active.set()
        until(lambda: viewers.refreshed >= 3, "it was drawn again")
        viewers.stop()
    viewers.check()
    assert heard[:2] == [b"open", b"sized"]
    assert heard[2:8] == [b"again", b"again", b"rest", b"again", b"again", b"rest"][: len(heard) - 2]
    assert viewers.received >= 3 * len(b"drawn")


def test_a_cycle_holds_every_part_as_often_as_it_is_due() -> None:
    """One part every five seconds and another every fifteen, wherever that falls, with timers that drift."""
    heads = [(0.0, b"head"), (5.2, b"head"), (9.7, b"head"), (14.6, b"head")]
    for late in (0.4, 5.0, 11.9, 14.9):
        again = [(late, b"rest"), *([(late + 15.0, b"rest")] if late < 2.5 else [])]
        cycle = cycle_of(sorted([*heads, *again]), 5.0)
        assert len(cycle) == 3
        assert sorted(message for refresh in cycle for message in refresh) == [b"head"] * 3 + [b"rest"]
    assert cycle_of([(0.0, b"head"), (10.1, b"head"), (10.2, b"rest")], 5.0) == ((b"head",), (b"head", b"rest"))
    assert cycle_of([(0.0, b"head"), (9.0, b"rest"), (10.0, b"head")], 10.0) == ((b"rest", b"head"),)


def test_a_recording_lasts_until_the_slowest_part_was_drawn() -> None:
    assert CYCLE_S % CHART_STEP_S == 0


def test_a_page_that_is_not_answered_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewers_module, "PATIENCE_S", 0.2)
    with server(answers=False) as (address, _):
        viewers = Viewers(address, [RECORDED], refresh_s=0.05)
        viewers.active.set()
        viewers.start()
        until(lambda: bool(viewers.failures), "somebody notices")
        viewers.stop()
    with pytest.raises(SlipstreamError, match="/x: no answer"):
        viewers.check()


def test_a_page_that_is_sent_something_else_is_no_measurement() -> None:
    with server(answers=True, drawn=b"?") as (address, _):
        viewers = Viewers(address, [RECORDED], refresh_s=0.05)
        viewers.active.set()
        viewers.start()
        until(lambda: viewers.refreshed >= 3, "it was drawn again")
        viewers.stop()
    with pytest.raises(SlipstreamError, match="not what this dashboard draws again by"):
        viewers.check()
