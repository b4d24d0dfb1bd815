"""Making a version again from the database alone: its manifest, and the traces its lineage names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.contracts import ProposerKind, SlipstreamError, artifact_digest
from engine.learner.memory import rebuild_memory
from engine.speculation.artifact import MANIFEST
from engine.speculation.memory import MEMORY_FILE
from engine.store.database import Database
from engine.store.repositories import intake, policies
from engine.store.repositories.intake import TrainableTrace

Rebuilder = Callable[[Sequence[TrainableTrace], Mapping[str, Any]], dict[str, bytes]]
"""(training traces, manifest) → the files beside the manifest."""
REBUILDERS: dict[ProposerKind, Rebuilder] = {
    ProposerKind.NONE: lambda train, manifest: {},
    ProposerKind.NGRAM: lambda train, manifest: {},
    ProposerKind.TRACE_MEMORY: lambda train, manifest: {MEMORY_FILE: rebuild_memory(train, manifest)},
}


class NotRebuilt(SlipstreamError):
    """The version cannot be made again: says what is missing, or how far it came."""


def rebuild(db: Database, number: int, more: Mapping[ProposerKind, Rebuilder] | None = None) -> dict[str, bytes]:
    """The files of a version, made again; NotRebuilt unless they have its digest, byte for byte.

    ``more``: rebuilders of kinds that need more than tokens, a target for instance.
    """
    rebuilders = {**REBUILDERS, **(more or {})}
    with db.read() as session:
        version = policies.get(session, number)
        if version is None:
            raise SlipstreamError(f"There is no policy version {number}. `slipstream policy list` shows them.")
        parts = [part for part in policies.lineage(session, number) if part.role == policies.TRAIN]
        wanted = parts[0].members.ordinals() if parts else []
        train = tuple(intake.load(session, wanted))
    if len(train) < len(wanted):
        raise NotRebuilt(
            f"v{number} was made of {len(wanted)} traces, {len(wanted) - len(train)} of which have no tokens any more: "
            "past their retention (telemetry.payload_retention_days), or their tenant was forgotten. Its files may "
            "still be in MLflow or on another replica."
        )
    if version.kind not in rebuilders:
        raise NotRebuilt(f"v{number} is a {version.kind} policy, and there is no way to make one of those again.")
    manifest = json.dumps(version.manifest, indent=1, sort_keys=True, ensure_ascii=False).encode()
    try:
        files = {MANIFEST: manifest, **rebuilders[version.kind](train, version.manifest)}
    except KeyError as missing:
        raise NotRebuilt(f"The manifest of v{number} does not say how it was made: {missing} is missing.") from None
    if (digest := artifact_digest(files)) != version.digest:
        raise NotRebuilt(
            f"v{number} came out differently: sha256 {digest[:12]}… instead of {version.digest[:12]}…. "
            f"It was made by {version.manifest['lineage'].get('code', 'an unknown version')}."
        )
    return files
