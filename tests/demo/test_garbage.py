"""The deliberately bad policy is bad in the way it claims: it drafts everywhere, and wrongly."""

from __future__ import annotations

import numpy as np

from engine.contracts import ProposerKind, artifact_digest
from engine.demo.garbage import spoil
from engine.speculation.artifact import build_artifact, load_proposer
from engine.speculation.memory import MEMORY_FILE
from engine.speculation.replay import replay
from tests.trace_memory import TraceMemoryBuilder


def test_a_spoiled_memory_drafts_as_much_and_hits_next_to_nothing() -> None:
    rng = np.random.default_rng(0)
    responses = [np.tile(rng.integers(0, 500, 40), 2).tolist() for _ in range(6)]
    builder = TraceMemoryBuilder()
    for response in responses:
        builder.add("chat", [1, 2, 3], response)
    good = build_artifact(
        ProposerKind.TRACE_MEMORY,
        4,
        files={MEMORY_FILE: builder.build(10**6)},
        target_fingerprint="t",
        tokenizer_fingerprint="k",
    )
    bad = spoil(good, rng)
    counts = [
        replay(load_proposer(files, artifact_digest(files), "t", "k"), "chat", [1, 2, 3], responses[0][:40], 4)
        for files in (good, bad)
    ]
    assert counts[0].accepted / counts[0].drafted > 0.9
    assert counts[1].drafted > 0.5 * counts[0].drafted
    assert counts[1].accepted / counts[1].drafted < 0.05
