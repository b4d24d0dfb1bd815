"""Policy artifacts on disk, each in a folder named by its digest. A folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from engine.contracts import SlipstreamError, artifact_digest

ABANDONED_S = 86_400.0
"""Age after which a folder that another machine has begun is taken for abandoned."""
log = logging.getLogger(__name__)


class ArtifactError(SlipstreamError):
    """An artifact that is missing, or is not what its name promises."""


class ArtifactStore:
    """Content-addressed folders under ``root``: ``root/<digest>/<file>``. Safe for many processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, files: Mapping[str, bytes]) -> str:
        """Keep an artifact and give its digest. The same files again change nothing; a damaged folder is replaced."""
        if not files:
            raise ArtifactError("A policy artifact needs at least its manifest.json, got no files.")
        for name in files:
            if name != Path(name).name or name.startswith("."):
                raise ArtifactError(f"{name!r} is no name for a file of an artifact: a plain name without folders.")
        digest = artifact_digest(files)
        folder = self.path(digest)
        if self.is_sound(digest):
            return digest
        self.root.mkdir(parents=True, exist_ok=True)
        fresh = self.root / _own_name(".new")
        fresh.mkdir()
        try:
            for name, data in files.items():
                _write(fresh / name, data)
            try:
                fresh.rename(folder)
            except OSError:  # there is a folder: somebody else's with the same bytes, or a damaged one
                if not self.is_sound(digest):
                    self._clear(folder)
                    fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return digest

    def path(self, digest: str) -> Path:
        """The folder of an artifact, whether it is there or not."""
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise ArtifactError(f"{digest!r} is no digest: 64 hexadecimal digits.")
        return self.root / digest

    def files(self, digest: str) -> dict[str, bytes]:
        """The files of an artifact, verified against its digest."""
        folder = self.path(digest)
        if not folder.is_dir():
            raise ArtifactError(
                f"Policy artifact {digest[:12]}… is not in {self.root}. Copy it from another replica or from MLflow."
            )
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        if (found := artifact_digest(files)) != digest:
            raise ArtifactError(
                f"Policy artifact {digest[:12]}… in {self.root} was changed on disk: its files hash to {found[:12]}…. "
                "Remove the folder and publish the policy again."
            )
        return files

    def is_sound(self, digest: str) -> bool:
        """Whether the artifact is there and is what its name says."""
        try:
            self.files(digest)
        except ArtifactError:
            return False
        return True

    def sweep(self) -> int:
        """Delete what writers that were killed have left behind; how many folders. Those of living writers stay."""
        left = [path for kind in (".new", ".damaged") for path in self.root.glob(f"{kind}-*") if _abandoned(path)]
        for path in left:
            log.warning("removing %s: whoever wrote it was killed", path)
            shutil.rmtree(path, ignore_errors=True)
        return len(left)

    def discard(self, digest: str) -> None:
        """Delete an artifact that no version names."""
        self._clear(self.path(digest))

    def _clear(self, folder: Path) -> None:
        """Take a folder out of the way in one step, then delete it."""
        aside = self.root / _own_name(".damaged")
        with contextlib.suppress(FileNotFoundError):  # somebody else was faster
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _own_name(kind: str) -> str:
    """A name that says which process made it, for ``sweep``."""
    return f"{kind}-{os.getpid()}-{uuid.uuid4().hex}-{socket.gethostname()}"


def _abandoned(path: Path) -> bool:
    """Whether its writer is dead, or, where that cannot be known, whether it is old."""
    parts = path.name.split("-", 3)
    if len(parts) == 4 and parts[1].isdigit() and parts[3] == socket.gethostname():
        try:
            os.kill(int(parts[1]), 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it lives, and is another user's
            return False
        return False
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > ABANDONED_S
    return False


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
