"""Artifacts are what their digest says, or they are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.contracts import artifact_digest
from engine.registry import artifacts
from engine.registry.artifacts import ArtifactError, ArtifactStore

FILES = {"manifest.json": b'{"kind": "ngram"}', "memory.safetensors": b"\x00\x01"}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "policies")


def test_files_come_back_under_their_digest(store: ArtifactStore) -> None:
    digest = store.put(FILES)
    assert digest == artifact_digest(FILES)
    assert store.files(digest) == FILES
    assert store.put(FILES) == digest
    assert [p.name for p in store.root.iterdir()] == [digest]


def test_any_change_on_disk_is_found_and_repaired_by_publishing_again(store: ArtifactStore) -> None:
    digest = store.put(FILES)
    for change in (
        lambda: (store.path(digest) / "memory.safetensors").write_bytes(b"\x00\x02"),
        lambda: (store.path(digest) / "extra").write_bytes(b""),
        lambda: (store.path(digest) / "manifest.json").unlink(),
    ):
        change()
        with pytest.raises(ArtifactError, match="was changed on disk"):
            store.files(digest)
        store.put(FILES)
        assert store.files(digest) == FILES


def test_what_is_not_there_says_where_it_was_looked_for(store: ArtifactStore) -> None:
    with pytest.raises(ArtifactError, match=str(store.root)):
        store.files("0" * 64)
    with pytest.raises(ArtifactError, match="64 hexadecimal digits"):
        store.path("../../etc")


@pytest.mark.parametrize("files", [{}, {"a/b": b""}, {"../up": b""}, {".hidden": b""}])
def test_names_that_leave_the_folder_are_refused(store: ArtifactStore, files: dict[str, bytes]) -> None:
    with pytest.raises(ArtifactError):
        store.put(files)


def test_a_write_that_fails_leaves_nothing_behind(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="no space"):
            store.put(FILES)
    assert list(store.root.iterdir()) == []


def test_what_a_killed_writer_left_is_swept_and_nothing_of_the_living(store: ArtifactStore) -> None:
    child = "import os, signal, sys; from pathlib import Path; from engine.registry.artifacts import ArtifactStore\n"
    child += "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"
    child += "ArtifactStore(Path(sys.argv[1])).put({'manifest.json': b'{}'})"
    assert subprocess.run([sys.executable, "-c", child, str(store.root)], check=False).returncode == -signal.SIGKILL
    digest = store.put(FILES)
    ours, elsewhere, old = (store.root / name for name in (artifacts._own_name(".new"), ".new-1-a-far-away", ".new-x"))
    for folder in (ours, elsewhere, old):
        folder.mkdir()
    os.utime(old, (0, 0))
    assert store.sweep() == 2  # the killed one's, and what is too old to be anybody's
    assert {path.name for path in store.root.iterdir()} == {digest, ours.name, elsewhere.name}


def test_many_writers_of_the_same_artifact_agree(store: ArtifactStore) -> None:
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(store.put(FILES))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [artifact_digest(FILES)] * 8
    assert store.files(made[0]) == FILES
