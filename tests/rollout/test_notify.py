"""Every transition is told once to each sink, signed, tried again, and nobody waits for a sink that is down."""

from __future__ import annotations

import json
import os
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text

from engine.contracts import RolloutState
from engine.rollout import notify
from engine.rollout.controller import Controller
from engine.rollout.launch import launch
from engine.rollout.notify import KEPT, Command, Notifier, Webhook, sign
from engine.settings import RolloutSettings
from engine.store.database import Database
from engine.store.repositories import commands, notifications, operations, rollouts
from engine.store.repositories.leases import LeaseLost
from tests.rollout import database_world as world

NONE, CHAMPION, TRIED = 1, 2, 3
NOW = datetime.now(UTC)
TURNS = ["READY", "RAMPING", "ROLLING_BACK", "ROLLED_BACK"]


@pytest.fixture
def going(db: Database) -> Database:
    """A rollout whose canary has just been put before traffic and aborted by a person."""
    world.versions(db, 3)
    world.first_plan(db, CHAMPION, NONE)
    world.beat(db, NOW, (NONE, CHAMPION, TRIED))
    Notifier(db, [Recorder()], "a").tick(NOW)  # begins here: what was before is not news
    made = launch(db, canary=TRIED, actor="ann", preset="fast", now=NOW)
    acting = Controller(db, "a", 15.0)
    acting.tick(NOW)
    with db.write() as session:
        commands.ask(session, made.id, "abort", "ann", "wrong version")
    for second in (1, 2, 3):
        world.beat(db, NOW + timedelta(seconds=second), (NONE, CHAMPION, TRIED))
        acting.tick(NOW + timedelta(seconds=second))
    return db


class Recorder:
    """A sink that keeps what arrives and is down while ``down``."""

    name = "recorder"

    def __init__(self, down: bool = False) -> None:
        self.down, self.got = down, []  # type: bool, list[tuple[int, dict[str, object]]]

    def deliver(self, delivery: int, body: bytes, now: datetime) -> None:
        if self.down:
            raise OSError("nobody listens")
        self.got.append((delivery, json.loads(body)))


def test_each_transition_is_told_once_in_order(going: Database) -> None:
    sink = Recorder()
    notifier = Notifier(going, [sink], "a")
    assert notifier.tick(NOW) == len(TURNS)
    assert notifier.tick(NOW) == 0
    assert [told["to"] for _, told in sink.got] == TURNS
    assert [told["canary"] for _, told in sink.got] == [TRIED] * len(TURNS)
    assert len({delivery for delivery, _ in sink.got}) == len(TURNS)


def test_what_did_not_arrive_is_tried_again_later_and_others_are_not_held_up(going: Database) -> None:
    class Other(Recorder):
        name = "other"

    down, other = Recorder(down=True), Other()
    notifier = Notifier(going, [down, other], "a")
    Notifier(going, [other], "a").tick(NOW)
    assert notifier.tick(NOW) == 0
    down.down = False
    assert notifier.tick(NOW + timedelta(seconds=1)) == 0  # not due yet
    assert notifier.tick(NOW + timedelta(seconds=2)) == len(TURNS)
    assert [told["to"] for _, told in down.got] == TURNS


def test_a_notification_outlives_an_outage_of_hours_and_is_given_up_after_a_day(going: Database) -> None:
    down, at = Recorder(down=True), NOW
    notifier = Notifier(going, [down], "a")
    while at < NOW + KEPT / 4:
        notifier.tick(at)
        with going.read() as session:
            (standing,) = notifications.standings(session)
        assert standing.next_at - at <= timedelta(seconds=300)
        at = standing.next_at
    assert standing.tries > 20
    notifier.tick(NOW + KEPT)  # READY is a day old, and what came after it is a second younger
    down.down = False
    notifier.tick(NOW + KEPT + timedelta(seconds=301))
    assert [told["to"] for _, told in down.got] == TURNS[2:]


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (Command("notify 'without its second quote"), "ValueError: No closing quotation"),
        (Webhook("nowhere", None), "UnsupportedProtocol: "),
        (Command("no-such-program"), "FileNotFoundError: "),
    ],
    ids=["quoting", "address", "program"],
)
def test_a_sink_that_is_set_up_wrongly_is_shown_given_up_and_holds_up_no_other(
    going: Database, broken: Command | Webhook, error: str
) -> None:
    other, at = Recorder(), NOW
    Notifier(going, [broken], "a").tick(NOW - timedelta(seconds=1))
    with going.write() as session:
        notifications.advance(session, notifications.Cursor(other.name, 0, 0, NOW, None))
        session.execute(text("UPDATE notification_cursors SET decision_id = 0"))
    assert Notifier(going, [broken, other], "a").tick(at) == len(TURNS)
    with going.read() as session:
        shown = {s.sink: s for s in notifications.standings(session)}
    assert (shown[broken.name].decision_id, shown[broken.name].tries) == (0, 1)
    assert (shown[broken.name].error or "").startswith(error)
    assert (shown[other.name].tries, shown[other.name].error) == (0, None)
    Notifier(going, [broken], "a").tick(at + KEPT)
    with going.read() as session:
        assert {s.sink: s for s in notifications.standings(session)}[broken.name].decision_id > 0


def test_no_error_ends_the_notifiers_thread(going: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that make no sink, an error of Python in a tick: the next tick comes all the same."""
    stop, ticks = threading.Event(), []

    def tick(self: Notifier, now: datetime) -> int:
        ticks.append(now)
        if len(ticks) == 3:
            stop.set()
        raise ZeroDivisionError("nobody foresaw this")

    monkeypatch.setattr(Notifier, "tick", tick)
    chosen = RolloutSettings(notify_command="notify 'without its second quote", tick_s=1e-6)
    notify.run(chosen, going, "a", stop, lambda: NOW)
    assert len(ticks) == 3


def test_a_cursor_never_goes_back(going: Database) -> None:
    sink = Recorder()
    assert Notifier(going, [sink], "a").tick(NOW) == len(TURNS)
    with going.write() as session:
        notifications.advance(session, notifications.Cursor(sink.name, 0, 1, NOW, "a slow notifier, long overtaken"))
    assert Notifier(going, [sink], "a").tick(NOW) == 0


@pytest.mark.parametrize("leased", [True, False])
def test_of_two_notifiers_one_tells(going: Database, monkeypatch: pytest.MonkeyPatch, leased: bool) -> None:
    """The second looks while the first is delivering; without the lease each transition would be told twice."""
    if not leased:
        monkeypatch.setattr(Notifier, "_lease", lambda self, now: 1)
        monkeypatch.setattr("engine.rollout.notify.leases.check", lambda *_: None)

    class Slow(Recorder):
        def deliver(self, delivery: int, body: bytes, now: datetime) -> None:
            if not self.got:
                Notifier(going, [quick], "b").tick(now)
            super().deliver(delivery, body, now)

    slow, quick = Slow(), Recorder()
    Notifier(going, [slow], "a").tick(NOW)
    assert [told["to"] for _, told in slow.got] == TURNS
    assert len(quick.got) == (0 if leased else len(TURNS))


def test_a_notifier_that_was_asleep_tells_no_more_and_moves_no_cursor(going: Database) -> None:
    asleep, awake = Recorder(), Recorder()

    class Sleepy(Recorder):
        def deliver(self, delivery: int, body: bytes, now: datetime) -> None:
            super().deliver(delivery, body, now)
            Notifier(going, [awake], "b").tick(later)  # its lease has ended while it delivered

    later = NOW + timedelta(days=1)
    sleepy = Sleepy()
    with pytest.raises(LeaseLost, match="held by b"):
        Notifier(going, [sleepy], "a").tick(NOW)
    assert (len(sleepy.got), len(awake.got)) == (1, len(TURNS))
    assert Notifier(going, [asleep], "a").tick(NOW) == 0


def test_a_webhook_is_signed_and_an_error_answer_is_a_failure() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200 if len(seen) == 1 else 503)

    hook = Webhook("http://hook", "secret", httpx.Client(transport=httpx.MockTransport(answer)))
    hook.deliver(7, b"{}", NOW)
    headers = seen[0].headers
    assert headers["x-slipstream-signature"] == sign("secret", headers["x-slipstream-timestamp"], b"{}")
    assert sign("other", headers["x-slipstream-timestamp"], b"{}") != headers["x-slipstream-signature"]
    assert headers["x-slipstream-delivery"] == "7"
    with pytest.raises(httpx.HTTPStatusError):
        hook.deliver(8, b"{}", NOW)


def test_a_command_gets_json_and_its_exit_code_counts(tmp_path: Path) -> None:
    out = tmp_path / "told.json"
    Command(f"{sys.executable} -c \"import sys; open('{out}', 'w').write(sys.stdin.read())\"").deliver(1, b"{}", NOW)
    assert out.read_text() == "{}"
    with pytest.raises(notify.subprocess.SubprocessError):
        Command(f"{sys.executable} -c 'raise SystemExit(3)'").deliver(1, b"{}", NOW)


def test_a_command_has_no_terminal_to_be_stopped_by(tmp_path: Path) -> None:
    """Stopped with its whole group for asking a password, it would take the controller along."""
    out = tmp_path / "session"
    Command(f"{sys.executable} -c \"import os; open('{out}', 'w').write(str(os.getsid(0)))\"").deliver(1, b"{}", NOW)
    assert int(out.read_text()) != os.getsid(0)


def test_the_record_of_operations_counts_changes_and_what_people_did(going: Database) -> None:
    with going.read() as session:
        weeks = operations.weeks(session, NOW - timedelta(days=14), NOW + timedelta(hours=1))
        assert rollouts.list_rollouts(session)[0].state is RolloutState.ROLLED_BACK
    assert len(weeks) == 1
    week = weeks[0]
    assert (week.changes, week.ended, week.failed, week.failure_rate) == (1, 1, 1, 1.0)
    assert week.interventions == 1
    assert week.detect_s is None  # no guard failed: a person asked
    # Plans are dated by the database's clock, these decisions by the moment this module was read.
    apart = (going.now() - NOW).total_seconds() / 3600
    assert abs(week.canary_hours) < abs(apart) + 0.1
