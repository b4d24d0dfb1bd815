"""Planted bad updates: what a learner gone wrong would propose. Each must be refused by the gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from safetensors import numpy as safetensors

from engine.learner.trainer import TrainingDiverged
from engine.speculation.artifact import MANIFEST, build_artifact, read_manifest
from engine.speculation.memory import MEMORY_FILE
from engine.speculation.memory_build import POOLED
from engine.speculation.neural_file import SHAPE_FILE, VOCABULARY, WEIGHTS_FILE, draft_files, pack, unpack

Files = dict[str, bytes]
OVERSHOT = "learning rate x100"


def sabotaged(
    good: Mapping[str, bytes], rng: np.random.Generator, overshoot: Callable[[Files], Files] | None = None
) -> list[tuple[str, Files]]:
    """(name, a bad version) of a good trace memory or hybrid, in random order.

    In a hybrid the draft is spoiled as well. ``overshoot`` tunes a draft's files at a hundred times the learning rate;
    where that diverges, the learner has nothing to offer, and neither has this.
    """
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
        "shuffled vocabulary": _again({**good, **_misread(good, rng)}, shuffled),
        OVERSHOT: _again(good, sure),
        "one class ruined": _again(good, ruined),
        "not finite": {**good, WEIGHTS_FILE: _with_nan(good, rng)},
        "stale fingerprint": _again(good, arrays, fingerprint="0" * 64),
        "cut short": {**good, MEMORY_FILE: good[MEMORY_FILE][:-64]},
    }
    if SHAPE_FILE in good and overshoot is not None:
        try:
            found[OVERSHOT] = _again({**good, **overshoot(draft_files(good))}, sure)
        except TrainingDiverged:
            del found[OVERSHOT]
    return [(name, found[name]) for name in rng.permutation(sorted(found)).tolist()]


def _misread(good: Mapping[str, bytes], rng: np.random.Generator) -> Files:
    """The draft of a hybrid with another vocabulary than it learned: other ids of the same range, ascending as a file
    must have them, so it loads and says other tokens. Nothing where there is no draft."""
    if SHAPE_FILE not in good:
        return {}
    draft = unpack(good)
    least = 2 * len(draft.vocabulary)  # a small vocabulary may be all of its range
    others = rng.choice(max(least, 1 + int(draft.vocabulary[-1])), len(draft.vocabulary), replace=False)
    return pack(draft.config, draft.weights, torch.from_numpy(np.sort(others)))


def _with_nan(good: Mapping[str, bytes], rng: np.random.Generator) -> bytes:
    """The draft's weights, one number of them NaN; a file with nothing else where there is no draft."""
    if WEIGHTS_FILE not in good:
        return safetensors.save({"weight": np.array([1.0, np.nan], np.float32)})
    arrays = safetensors.load(good[WEIGHTS_FILE])
    name = rng.choice(sorted(set(arrays) - {VOCABULARY}))
    weight = arrays[name].copy()
    weight.flat[rng.integers(weight.size)] = np.nan
    return safetensors.save({**arrays, name: weight})


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
