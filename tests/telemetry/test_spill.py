"""A spilled batch is there whole or not at all, and comes back as it was."""

from __future__ import annotations

import errno
from pathlib import Path
from uuid import uuid4

import pytest

from engine.contracts import SlipstreamError
from engine.telemetry.spill import Batch, Spill, SpillFull, SpillRoom
from tests.telemetry.records import START, record


def test_a_batch_comes_back_as_it_was(tmp_path: Path) -> None:
    batch = Batch(uuid4(), 7, [record(n) for n in range(5)] + [record(9, payload=None)])
    name = Spill(tmp_path, 10**8).put(batch, START)
    again = Spill(tmp_path, 10**8)
    assert again.oldest() == (name, batch)
    again.remove(name)
    assert again.oldest() is None
    assert again.files == again.bytes == 0


def test_a_write_cut_short_by_a_kill_is_not_a_batch(tmp_path: Path) -> None:
    (tmp_path / "20260301T000000000000-00-000000001.jsonl.tmp").write_text('{"half": ')
    spill = Spill(tmp_path, 10**8)
    assert spill.oldest() is None
    assert not list(tmp_path.iterdir())


def test_an_unreadable_file_is_set_aside_and_the_next_one_served(tmp_path: Path) -> None:
    spill = Spill(tmp_path, 10**8)
    first = spill.put(Batch(uuid4(), 1, [record(1)]), START)
    good = Batch(uuid4(), 2, [record(2)])
    second = spill.put(good, START.replace(hour=23, minute=59, second=1))
    (tmp_path / first).write_text("no json")
    again = Spill(tmp_path, 10**8)
    assert again.oldest() == (second, good)
    assert again.set_aside_files == again.unreadable == 1


def test_a_full_disk_leaves_no_half_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    spill = Spill(tmp_path, 10**8)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        spill.put(Batch(uuid4(), 1, [record(1)]), START)
    assert not list(tmp_path.iterdir())
    assert spill.files == spill.bytes == 0


def test_the_oldest_batch_comes_first(tmp_path: Path) -> None:
    spill = Spill(tmp_path, 10**8)
    late = spill.put(Batch(uuid4(), 1, [record(1)]), START.replace(second=9))
    early = spill.put(Batch(uuid4(), 2, [record(2)]), START)
    assert early < late
    found = spill.oldest()
    assert found is not None
    assert found[0] == early


def test_one_folder_has_one_writer(tmp_path: Path) -> None:
    first = SpillRoom(tmp_path, "r0")
    with pytest.raises(SlipstreamError, match=r"engine\.replica_id"):
        SpillRoom(tmp_path, "r0")
    first.close()
    SpillRoom(tmp_path, "r0").close()


def test_what_a_replica_of_another_name_left_is_taken_over_unless_it_lives(tmp_path: Path) -> None:
    batches = {name: Batch(uuid4(), 1, [record(n)]) for n, name in enumerate(("gone", "alive"))}
    for name, batch in batches.items():
        Spill(tmp_path / name, 10**8).put(batch, START)
    alive = SpillRoom(tmp_path, "alive")  # takes over from "gone" as well
    assert Spill(alive.folder, 10**8).files == 2
    room = SpillRoom(tmp_path, "new")
    assert Spill(room.folder, 10**8).files == 0
    alive.close()
    room.close()
    last = SpillRoom(tmp_path, "last")
    assert Spill(last.folder, 10**8).files == 2
    last.close()


def test_a_bound_is_a_bound(tmp_path: Path) -> None:
    spill = Spill(tmp_path, 10)
    with pytest.raises(SpillFull, match="of at most 10"):
        spill.put(Batch(uuid4(), 1, [record(1)]), START)
    assert not list(tmp_path.iterdir())
