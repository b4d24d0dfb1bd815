"""How the threads of a pass share its work, played out in one thread: in any order in which they may come to it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from engine.model import compiler
from tests.model.test_kernels import needs_compiler

HEADER = compiler.HEADERS / "team.h"
MOST = 6
PLAYED = """
#include "team.h"
struct share shares[MOST];
struct place place;
static struct team players[MOST];
void begin(int64_t all) {
  memset(shares, 0, sizeof shares);
  place = (struct place){shares, 0};
  for (int64_t me = 0; me < all; me++) memcpy(players + me, &(struct team){&place, me, all, 1}, sizeof *players);
}
void taken(int64_t me, int64_t n, int64_t grain, int64_t *out) {
  const struct some some = take(players + me, n, grain);
  out[0] = some.begin, out[1] = some.end;
}
void handed_in(int64_t me) { hand_in(players + me); }
void gathered(int64_t me) { come(players + me), hand_in(players + me); }
void is_over(int64_t me, int64_t *out) { *out = over(players + me); }
"""


@dataclass(frozen=True, slots=True)
class Phase:
    items: int
    grain: int
    gathers: bool
    """Whether nobody goes on before all have come."""


class Played:
    """Threads that do ``phases``, one act of one of them at a time."""

    def __init__(self, header: Path, folder: Path) -> None:
        (folder / "team.h").write_text(header.read_text())
        (folder / "threads.h").write_text((compiler.HEADERS / "threads.h").read_text())
        source = folder / "played.c"
        source.write_text(PLAYED)
        library = compiler.compile_c(source, {"MOST": MOST}, lambda path: ctypes.CDLL(str(path)))
        assert library is not None
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        self._begin = compiler.function(library.begin, number)
        self._taken = compiler.function(library.taken, number, number, number, pointer)
        self._ends = {False: library.handed_in, True: library.gathered}
        self._over = compiler.function(library.is_over, number, pointer)

    def play(self, threads: int, phases: list[Phase], rng: np.random.Generator, away: set[int]) -> str | None:
        """What went wrong. Those who are ``away`` come when all others can do no more."""
        self._begin(threads)
        done = [np.zeros(phase.items, int) for phase in phases]
        phase_of, waits, holds = [0] * threads, [False] * threads, [(0, 0)] * threads
        while any(at < len(phases) for at in phase_of):
            able = [me for me in range(threads) if phase_of[me] < len(phases) and (not waits[me] or self.over(me))]
            if not able:
                return "all wait for each other"
            here = [me for me in able if me not in away] or able
            me = int(rng.choice(here))
            at = phase_of[me]
            if waits[me]:
                if not all(did.all() for did in done[: at + 1]):
                    return "a thread went on though not all was done"
                if phases[at].gathers and any(other < at for other in phase_of):
                    return "a thread went on though not all had come"
                waits[me], phase_of[me] = False, at + 1
                continue
            done[at][slice(*holds[me])] += 1
            holds[me] = self.take(me, phases[at])
            if holds[me][0] == holds[me][1]:
                self._ends[phases[at].gathers](ctypes.c_int64(me))
                waits[me] = True
        return None if all((did == 1).all() for did in done) else "something was not done once"

    def take(self, me: int, phase: Phase) -> tuple[int, int]:
        out = (ctypes.c_int64 * 2)()
        self._taken(me, phase.items, phase.grain, out)
        return out[0], out[1]

    def over(self, me: int) -> bool:
        out = ctypes.c_int64()
        self._over(me, ctypes.byref(out))
        return bool(out.value)


def wrong(played: Played) -> str | None:
    """What went wrong in any of many plays."""
    rng = np.random.default_rng(5)
    for _ in range(300):
        threads = int(rng.integers(1, MOST + 1))
        phases = [
            Phase(int(rng.integers(0, 12)), int(rng.integers(1, 5)), bool(rng.random() < 0.2))
            for _ in range(rng.integers(1, 6))
        ]
        away = {me for me in range(threads) if rng.random() < 0.3}
        if found := played.play(threads, phases, rng, away):
            return found
    return None


@needs_compiler
def test_all_is_done_once_and_nobody_goes_on_before(tmp_path: Path) -> None:
    assert wrong(Played(HEADER, tmp_path)) is None


@needs_compiler
def test_a_thread_that_never_comes_keeps_nobody_waiting(tmp_path: Path) -> None:
    """As long as it has taken nothing."""
    played = Played(HEADER, tmp_path)
    played._begin(2)
    for _ in range(3):
        taken = [played.take(0, Phase(5, 2, False)) for _ in range(4)]
        assert taken == [(0, 2), (3, 5), (2, 3), (0, 0)]  # its own share, then the other's from behind
        played._ends[False](ctypes.c_int64(0))
        assert played.over(0)
    assert played.take(1, Phase(5, 2, False)) == (0, 0)


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong_text"),
    [
        ("(team->at ? 0 : COUNT_BITS)", "COUNT_BITS"),
        ("(struct some){back - count, back}", "(struct some){front, front + count}"),
        ("if (old >> 2 * COUNT_BITS > (uint64_t)team->phase) break;", ""),
        ("old < phase ? phase : old", "old"),
        ("team->mine += count;", "team->mine += count + (count > 2);"),
        (">= team->due", ">= team->due - 1"),
        ("team->items += team->all, team->mine++", "(void)0"),
        ("% team->all;", "% 2;"),
    ],
)
def test_a_fault_in_how_threads_share_is_seen(right: str, wrong_text: str, tmp_path: Path) -> None:
    text = HEADER.read_text()
    assert text.count(right) == 1
    (tmp_path / "faulty.h").write_text(text.replace(right, wrong_text))
    assert wrong(Played(tmp_path / "faulty.h", tmp_path))
