"""From an artifact to a version of the ledger: the files first, then row and lineage in one transaction.

A crash between the two leaves files that nobody names, never a version without files. MLflow is not asked here; it
mirrors the table later (``mlflow_registry``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.contracts import PolicyVersion, ProposerKind, SlipstreamError
from engine.registry.artifacts import ArtifactStore
from engine.store.database import Database, WriteSession
from engine.store.repositories import policies
from engine.store.repositories.policies import Lineage

MANIFEST = "manifest.json"


def publish(
    db: Database,
    store: ArtifactStore,
    files: Mapping[str, bytes],
    *,
    parent: int | None = None,
    gate: dict[str, Any] | None = None,
    lineage: Sequence[Lineage] = (),
    note: str = "",
    also: Callable[[WriteSession, PolicyVersion], None] | None = None,
) -> PolicyVersion:
    """Make a version of these files. The same files again give the version they already have.

    ``also`` writes in the same transaction what must be there if and only if the version is.

    Whether the policy is any good is the gate's question, not asked here: what is published can be tried by a rollout.
    """
    manifest = _manifest(files)
    digest = store.put(files)
    with db.write() as session:
        made = policies.register(
            session,
            digest=digest,
            kind=ProposerKind(manifest["kind"]),
            num_speculative_tokens=manifest["num_speculative_tokens"],
            manifest=manifest,
            parent_version=parent,
            gate=gate,
            note=note,
            lineage=lineage,
        )
        if also is not None:
            also(session, made)
        return made


def ensure_version(db: Database, store: ArtifactStore, files: Mapping[str, bytes], note: str = "") -> PolicyVersion:
    """The version of a policy that needs no learning (none, ngram), made on first use."""
    return publish(db, store, files, note=note or "built in")


def _manifest(files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        manifest = json.loads(files[MANIFEST])
        ProposerKind(manifest["kind"])
        if not isinstance(manifest["num_speculative_tokens"], int):
            raise ValueError(f"num_speculative_tokens is {manifest['num_speculative_tokens']!r}, not a whole number")
    except (KeyError, TypeError, ValueError) as error:
        raise SlipstreamError(
            f"These files ({sorted(files)}) are no policy artifact: {MANIFEST} is missing or wrong ({error!r}). "
            "engine.speculation.artifact.build_artifact makes one."
        ) from error
    return dict(manifest)
