"""What a signal does to a command that owns processes: it ends once, and leaves none of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from engine.ops import postgres, system
from engine.ops.interruption import SIGNALS, held, interruptible
from engine.settings import Settings
from tests.tiny_model import write_tiny_model
from tests.waiting import until

COMMAND = (sys.executable, "-m", "engine.cli")
DEAF = (
    "from engine.ops import interruption; from contextlib import nullcontext; interruption.interruptible = nullcontext"
)


@pytest.fixture(autouse=True)
def nothing_ignored() -> Iterator[None]:
    """As in a terminal, whatever started the tests: what is ignored stays ignored, in children too."""
    first = signal.default_int_handler
    before = {n: signal.signal(n, first if n == signal.SIGINT else signal.SIG_DFL) for n in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_an_exception_and_later_ones_cannot_break_off_the_ending(number: signal.Signals) -> None:
    steps = []

    def command() -> None:
        with interruptible():
            try:
                signal.raise_signal(number)
            finally:
                for again in SIGNALS:
                    signal.raise_signal(again)
                steps.append("ended")

    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(KeyboardInterrupt):
        command()
    assert steps == ["ended"]
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_what_is_held_is_finished_first() -> None:
    steps = []

    def command() -> None:
        with interruptible():
            with held(), held():
                signal.raise_signal(signal.SIGTERM)
                steps.append("started and noted")
            steps.append("never")

    with pytest.raises(KeyboardInterrupt):
        command()
    assert steps == ["started and noted"]


def test_an_ending_that_is_under_way_after_an_error_is_not_broken_off() -> None:
    steps = []

    def command() -> None:
        with interruptible():
            try:
                raise ValueError("why it ends")
            finally:
                with held():
                    signal.raise_signal(signal.SIGTERM)
                    steps.append("ended")

    with pytest.raises(KeyboardInterrupt) as raised:
        command()
    assert steps == ["ended"]
    assert isinstance(raised.value.__context__, ValueError)


def test_an_interruption_is_heard_after_a_held_step_that_failed() -> None:
    """Lost, it would leave a command running that somebody ended, wherever the error is caught."""

    def command() -> None:
        with interruptible(), suppress(ValueError), held():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("the step failed")

    with pytest.raises(KeyboardInterrupt) as raised:
        command()
    assert isinstance(raised.value.__context__, ValueError)


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interruption_that_a_callback_swallows_is_raised_again(number: signal.Signals) -> None:
    """Raised while the collector calls back, it ends there: the command would go on to its own end."""
    steps = []

    class Collected:
        def __del__(self) -> None:
            signal.raise_signal(number)
            steps.append("never")

    def command() -> None:
        with interruptible():
            Collected()
            time.sleep(60.0)  # what the command waits for, in vain were nothing raised again
            steps.append("never")

    before = signal.getsignal(signal.SIGALRM), sys.unraisablehook
    with pytest.raises(KeyboardInterrupt):
        command()
    assert not steps
    assert (signal.getsignal(signal.SIGALRM), sys.unraisablehook) == before


def test_one_that_is_swallowed_at_the_very_end_is_raised_too() -> None:
    class Collected:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def command() -> None:
        with interruptible():
            Collected()

    with pytest.raises(KeyboardInterrupt):
        command()


def test_an_alarm_that_somebody_else_has_set_stays_set() -> None:
    """As of a test runner that ends what hangs."""
    kept = signal.getitimer(signal.ITIMER_REAL)
    handler = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 1_000.0)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGALRM) is signal.SIG_IGN
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 900.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, *kept)
        signal.signal(signal.SIGALRM, handler)


def test_what_else_a_callback_swallows_is_said_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: said.append(type(lost.exc_value)))

    class Collected:
        def __del__(self) -> None:
            raise ValueError("not an interruption")

    with interruptible():
        Collected()
    assert said == [ValueError]


def test_what_was_ignored_from_the_start_stays_ignored() -> None:
    """`nohup slipstream up` outlives its terminal."""
    before, steps = signal.signal(signal.SIGHUP, signal.SIG_IGN), []
    try:
        with interruptible():
            signal.raise_signal(signal.SIGHUP)
            steps.append("goes on")
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert steps == ["goes on"]


@pytest.mark.parametrize("fails", [False, True])
def test_postgres_is_stopped_too_when_the_ending_of_the_others_is_interrupted_or_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: bool
) -> None:
    stopped = []

    class Ends:
        def stop(self) -> None:
            with held():
                signal.raise_signal(signal.SIGTERM)
                stopped.append("components")
                if fails:
                    raise OSError("no room for the state")

    monkeypatch.setattr(postgres, "stop", lambda home: stopped.append("postgres"))

    def command() -> None:
        with interruptible():
            system.stop(Settings(home=tmp_path), Ends())  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        command()
    assert stopped == ["components", "postgres"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where a command makes its temporary data directory; what it leaves there is ended at last."""
    with tempfile.TemporaryDirectory(prefix="slipstream-signals-", ignore_cleanup_errors=True) as made:
        path = Path(made)
        path.chmod(0o755)  # the embedded server runs as another user when we are root
        yield path
        for process in running_in(path):
            with suppress(psutil.Error):
                process.kill()


def running_in(folder: Path) -> list[psutil.Process]:
    """Processes that work in this folder or were told of it."""
    found = []
    for process in psutil.process_iter(["status"]):
        with suppress(psutil.Error):
            told = process.environ().get("SLIPSTREAM_HOME", "")
            theirs = any(place.startswith(str(folder)) for place in (process.cwd(), told))
            if theirs and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def begin(folder: Path, *words: str, command: tuple[str, ...] = COMMAND) -> subprocess.Popen[bytes]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLIPSTREAM_", "MLFLOW_"))}
    environ = kept | {"TMPDIR": str(folder), "SLIPSTREAM_CONFIG": ""}
    with (folder / "said").open("wb") as out:
        return subprocess.Popen([*command, *words], env=environ, stdout=out, stderr=out, start_new_session=True)


def serving(folder: Path) -> bool:
    """Whether the Postgres of the command's own data directory is up."""
    return any(postgres.running_url(home) for home in folder.glob("slipstream-bench-*"))


BENCH = ("bench", "store", "--traces", "3000000")


@pytest.mark.parametrize(
    "signals", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT), (signal.SIGHUP, signal.SIGTERM)]
)
def test_a_benchmark_that_is_ended_takes_its_postgres_along(folder: Path, signals: tuple[signal.Signals, ...]) -> None:
    process = begin(folder, *BENCH)
    until(lambda: serving(folder) or process.poll() is not None, "Postgres is up", pause_s=0.02)
    assert process.poll() is None, (folder / "said").read_text()
    for number in signals:
        process.send_signal(number)
    assert process.wait(60) != 0
    assert not running_in(folder)
    assert not list(folder.glob("slipstream-bench-*"))


def test_the_test_above_sees_a_benchmark_that_does_not_listen(folder: Path) -> None:
    deaf = (sys.executable, "-c", f"{DEAF}; from engine.cli.main import main; main()")
    process = begin(folder, *BENCH, command=deaf)
    until(lambda: serving(folder) or process.poll() is not None, "Postgres is up", pause_s=0.02)
    process.terminate()
    process.wait(60)
    assert running_in(folder)


@pytest.mark.slow
def test_a_benchmark_that_is_ended_takes_its_engine_along(folder: Path) -> None:
    write_tiny_model(folder / "tiny")
    process = begin(folder, "--set", f"engine.model={folder / 'tiny'}", "--set", "engine.dtype=float64",
                    "bench", "outage", "--seconds", "600")  # fmt: skip
    log = "slipstream-bench-*/logs/engine.log"
    until(lambda: bool(list(folder.glob(log))) or process.poll() is not None, "an engine is started", pause_s=0.05)
    assert process.poll() is None, (folder / "said").read_text()
    assert any("engine.cli" in one.cmdline() for one in running_in(folder))
    process.terminate()
    process.wait(60)
    assert not running_in(folder)
