"""Planted bad updates: what a learner gone wrong would propose. Each must be refused by the gate."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from safetensors import numpy as safetensors

from engine.speculation.artifact import MANIFEST, build_artifact, read_manifest
from engine.speculation.memory import MEMORY_FILE
from engine.speculation.memory_build import POOLED

Files = dict[str, bytes]


def sabotaged(good: Mapping[str, bytes], rng: np.random.Generator) -> list[tuple[str, Files]]:
    """(name, a bad version) of a good trace memory or hybrid, in random order."""
    arrays = safetensors.load(good[MEMORY_FILE])
    tables = sorted({name.rpartition("/")[0] for name in arrays})
    classes = [name for name in tables if name != POOLED] or tables
    vocabulary = rng.permutation(1 + max(int(arrays[f"{name}/token"].max(initial=0)) for name in tables))
    shuffled, sure, ruined = (dict(arrays) for _ in range(3))
    for name in tables:
        token = arrays[f"{name}/token"]
        shuffled[f"{name}/token"] = vocabulary[token].astype(np.uint32)
        # A step a hundred times too large: every second context is sure of another context's token.
        wrong = np.where(rng.random(len(token)) < 0.5, rng.permutation(token), token)
        sure[f"{name}/token"] = np.ascontiguousarray(wrong)
        sure[f"{name}/count"] = arrays[f"{name}/total"].copy()
    for name in {classes[int(rng.integers(len(classes)))], POOLED} & set(tables):
        ruined[f"{name}/token"] = rng.permutation(arrays[f"{name}/token"])
    found = {
        "shuffled vocabulary": _again(good, shuffled),
        "learning rate x100": _again(good, sure),
        "one class ruined": _again(good, ruined),
        "not finite": {**good, "draft.safetensors": safetensors.save({"weight": np.array([1.0, np.nan], np.float32)})},
        "stale fingerprint": _again(good, arrays, fingerprint="0" * 64),
        "cut short": {**good, MEMORY_FILE: good[MEMORY_FILE][:-64]},
    }
    return [(name, found[name]) for name in rng.permutation(sorted(found)).tolist()]


def _again(good: Mapping[str, bytes], arrays: Mapping[str, np.ndarray], fingerprint: str | None = None) -> Files:
    manifest = read_manifest(good)
    memory = safetensors.save({k: np.ascontiguousarray(v) for k, v in arrays.items()})
    others = {name: data for name, data in good.items() if name != MANIFEST}
    return build_artifact(
        manifest.kind,
        manifest.num_speculative_tokens,
        settings=manifest.settings,
        files={**others, MEMORY_FILE: memory},
        target_fingerprint=fingerprint or manifest.target_fingerprint,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
    )
