"""A deliberately bad policy: a trace memory that matches real contexts and is sure of the wrong next token.

It never changes an output, no draft can; it only wastes verify rows, and as its K control is off it never stops. That
is what a guard must see.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from safetensors import numpy as safetensors

from engine.contracts import PolicyVersion, ProposerKind
from engine.learner.learner import build_candidate
from engine.registry.artifacts import ArtifactStore
from engine.registry.publish import publish as publish_version
from engine.settings import Settings
from engine.speculation.artifact import build_artifact, read_manifest
from engine.speculation.memory import MEMORY_FILE
from engine.store.database import Database


def publish(settings: Settings, database: Database, rng: np.random.Generator) -> PolicyVersion:
    """Spoil a memory made from the newest traces and register it past the gate, by intention."""
    good = build_candidate(settings, database)
    return publish_version(
        database, ArtifactStore(settings.dir("policies")), spoil(good, rng), note="spoiled on purpose", gate=None
    )


def spoil(files: Mapping[str, bytes], rng: np.random.Generator) -> dict[str, bytes]:
    """The same contexts, each with a random other entry's token and full confidence in it."""
    arrays = safetensors.load(files[MEMORY_FILE])
    for name, column in arrays.items():
        if name.endswith("/token"):
            arrays[name] = np.ascontiguousarray(rng.permutation(column))
        if name.endswith("/count"):
            arrays[name] = arrays[name.removesuffix("count") + "total"].copy()
    manifest = read_manifest(files)
    return build_artifact(
        ProposerKind.TRACE_MEMORY,
        manifest.num_speculative_tokens,
        settings={**manifest.settings, "min_confidence": 0.0},
        control={"enabled": False},
        files={MEMORY_FILE: safetensors.save(arrays)},
        target_fingerprint=manifest.target_fingerprint,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
    )
