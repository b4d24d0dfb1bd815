"""Batches that could not be written to Postgres, on disk until they can.

One file a batch: written beside, synced, renamed, and the folder synced, so that a file is there whole or not at all.
A file keeps the key under which its batch is written, which is what makes a replay happen once.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any
from uuid import UUID

from engine.contracts import SlipstreamError, Status, TracePayload, TraceRecord, VerifyStep

log = logging.getLogger(__name__)
SUFFIX = ".jsonl"
BROKEN = ".broken"


@dataclass(frozen=True, slots=True)
class Batch:
    """Records under the key (writer_id, seq) that the database knows a written batch by."""

    writer_id: UUID
    seq: int
    records: Sequence[TraceRecord]


class SpillFull(OSError):
    """The folder holds as much as it may."""


class Spill:
    """A folder of batches, oldest first by name. One writer owns it; files of earlier processes are its to replay."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.tmp"):  # a write that its process did not survive; the batch was never promised
            left.unlink()
        self._sizes = {path.name: path.stat().st_size for path in folder.glob(f"*{SUFFIX}")}
        self._aside = sum(path.stat().st_size for path in folder.glob(f"*{BROKEN}"))
        self.unreadable = 0  # files that did not come back as a batch, since the start

    @property
    def files(self) -> int:
        return len(self._sizes)

    @property
    def bytes(self) -> int:
        """What the folder takes on disk, the files that were set aside included."""
        return sum(self._sizes.values()) + self._aside

    def put(self, batch: Batch, at: datetime) -> str:
        """Keep a batch under the name that is given back; SpillFull (an OSError, like a full disk) without room."""
        name = f"{at:%Y%m%dT%H%M%S%f}-{batch.writer_id.hex}-{batch.seq:09d}{SUFFIX}"
        data = "".join(json.dumps(_encode(record)) + "\n" for record in batch.records).encode()
        if self.bytes + len(data) > self.max_bytes:
            raise SpillFull(f"{self.folder} holds {self.bytes} bytes of at most {self.max_bytes}")
        temporary = self.folder / f"{name}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self.folder / name)
        except OSError:  # half a file on a full disk must not take the room that the next one needs
            temporary.unlink(missing_ok=True)
            raise
        self._sync_folder()
        self._sizes[name] = len(data)
        return name

    def oldest(self) -> tuple[str, Batch] | None:
        """(name, batch) of the file to replay next. A file that cannot be read is set aside, loudly."""
        while self._sizes:
            name = min(self._sizes)
            try:
                return name, _read(self.folder / name)
            except FileNotFoundError:
                log.error("spill file %s was removed by somebody else; its traces are lost", name)
                self.unreadable += 1
                del self._sizes[name]
            except (OSError, ValueError, KeyError, TypeError) as error:  # one bad file must not keep the others
                log.error("spill file %s cannot be read and is set aside as %s: %s", name, name + BROKEN, error)
                self.unreadable += 1
                self.set_aside(name)
        return None

    def remove(self, name: str) -> None:
        """Forget a batch that has been written."""
        (self.folder / name).unlink()
        del self._sizes[name]

    def set_aside(self, name: str) -> None:
        """Keep a file for people to look at, out of the way of the others."""
        size = self._sizes.pop(name)  # first: a file that cannot be moved must not come up again and again
        (self.folder / name).rename(self.folder / (name + BROKEN))
        self._aside += size

    @property
    def set_aside_files(self) -> int:
        return len(list(self.folder.glob(f"*{BROKEN}")))

    def _sync_folder(self) -> None:
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class SpillRoom:
    """A replica's folder under ``root``, held by this process: two writers in one would replay each other's files.

    What replicas of other names left there, and no process holds, is taken over: a name that is not used any more must
    not keep its traces from the database. Raises SlipstreamError where another process holds the folder.
    """

    def __init__(self, root: Path, replica_id: str) -> None:
        self.folder = root / replica_id
        lock = _hold(self.folder)
        if lock is None:
            raise SlipstreamError(
                f"Another engine on this machine spills its traces to {self.folder}. "
                "Give this one a name of its own: --set engine.replica_id=NAME."
            )
        self._lock: IO[str] = lock
        for other in sorted(path for path in root.iterdir() if path.is_dir() and path != self.folder):
            self._take_over(other)

    def close(self) -> None:
        self._lock.close()

    def _take_over(self, other: Path) -> None:
        if (lock := _hold(other)) is None:
            return
        with lock:
            left = sorted(other.glob(f"*{SUFFIX}"))
            for path in left:  # names are unique: each has its writer's id in it
                path.rename(self.folder / path.name)
        if left:
            log.warning("%d batches that replica %s had spilled are replayed here", len(left), other.name)


def _hold(folder: Path) -> IO[str] | None:
    """The open lock of a folder, held until it is closed or the process ends; None where another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _read(path: Path) -> Batch:
    _, writer, seq = path.name.removesuffix(SUFFIX).split("-")
    records = [_decode(json.loads(line)) for line in path.read_text().splitlines()]
    return Batch(UUID(hex=writer), int(seq), records)


def _encode(record: TraceRecord) -> dict[str, Any]:
    return asdict(record) | {"trace_id": record.trace_id.hex, "started_at": record.started_at.isoformat()}


def _decode(row: dict[str, Any]) -> TraceRecord:
    payload = row.pop("payload")
    if payload is not None:
        payload = TracePayload(
            prompt_ids=tuple(payload["prompt_ids"]),
            output_ids=tuple(payload["output_ids"]),
            steps=tuple(
                VerifyStep(tuple(step["proposed"]), step["accepted"], step["emitted"]) for step in payload["steps"]
            ),
        )
    return TraceRecord(
        **row
        | {
            "trace_id": UUID(hex=row["trace_id"]),
            "started_at": datetime.fromisoformat(row["started_at"]),
            "status": Status(row["status"]),
            "drafted_per_pos": tuple(row["drafted_per_pos"]),
            "accepted_per_pos": tuple(row["accepted_per_pos"]),
            "payload": payload,
        }
    )
