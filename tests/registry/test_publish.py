"""A version is its files, its row and its lineage, made once."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest

from engine.contracts import ProposerKind, SlipstreamError
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import ensure_version, publish
from engine.speculation.artifact import build_artifact
from engine.store.database import Database
from engine.store.members import Members
from engine.store.repositories import policies
from engine.store.repositories.policies import Lineage
from tests.rollout.database_world import take_in

NGRAM = build_artifact(ProposerKind.NGRAM, 4)
NONE = build_artifact(ProposerKind.NONE, 0)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def test_the_same_files_are_the_same_version(db: Database, store: ArtifactStore) -> None:
    first = ensure_version(db, store, NONE)
    second = ensure_version(db, store, NGRAM)
    assert ensure_version(db, store, NONE) == first
    assert (first.kind, second.kind) == (ProposerKind.NONE, ProposerKind.NGRAM)
    assert second.num_speculative_tokens == 4
    assert store.files(second.digest) == NGRAM


def test_lineage_can_be_asked_in_both_directions(db: Database, store: ArtifactStore) -> None:
    now = datetime.now(UTC)
    ids = take_in(db, [uuid4() for _ in range(3)], now)
    lineage = Lineage("train", Members.of([1, 2, 3]), now, now, {"chat": 3})
    made = publish(db, store, NGRAM, lineage=[lineage], gate={"passed": True})
    with db.read() as session:
        assert policies.influenced_by(session, ids[1]) == [made.version]
        assert policies.influenced_by(session, uuid4()) == []
        assert policies.trace_ids(session, policies.lineage(session, made.version)[0].members) == ids


def test_what_is_no_artifact_is_refused_before_anything_is_written(db: Database, store: ArtifactStore) -> None:
    for files in ({}, {"manifest.json": b"{"}, {"manifest.json": b'{"kind": "magic", "num_speculative_tokens": 1}'}):
        with pytest.raises(SlipstreamError, match="no policy artifact"):
            publish(db, store, files)
    with db.read() as session:
        assert policies.all_versions(session) == []
    assert list(store.root.iterdir()) == []
