"""Bad updates of a hybrid: the draft is spoiled too, in a way that an engine would load where that is the point."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.bench.adaptation.sabotage import OVERSHOT, Files, sabotaged
from engine.contracts import artifact_digest
from engine.learner import soundness
from engine.learner.neural import build_hybrid
from engine.learner.trainer import TrainingDiverged
from engine.model.draft import DraftConfig
from engine.settings import LearnerSettings
from engine.speculation.artifact import load_proposer
from engine.speculation.neural_file import draft_files, pack, unpack
from engine.speculation.proposer import PolicyError
from tests.learner.test_gate import TARGET, traffic

CONFIG = DraftConfig(64, 16, 24, 2, 1, 8, (0, 1, 2))


@pytest.fixture
def hybrid() -> Files:
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in CONFIG.shapes.items()}
    draft = pack(CONFIG, weights, torch.arange(64))
    return build_hybrid(traffic(np.random.default_rng(3), 20), TARGET, LearnerSettings(), draft, {})


def overshoot(draft: Files) -> Files:
    good = unpack(draft)
    return pack(good.config, {name: 100 * weight for name, weight in good.weights.items()}, good.vocabulary)


def loads(files: Files) -> bool:
    try:
        load_proposer(files, artifact_digest(files), TARGET.fingerprint, TARGET.tokenizer_fingerprint)
    except PolicyError:
        return False
    return True


def test_the_draft_of_a_hybrid_is_spoiled_as_well(hybrid: Files) -> None:
    bad = dict(sabotaged(hybrid, np.random.default_rng(4), overshoot))
    assert {kind for kind, files in bad.items() if loads(files)} == {
        "shuffled vocabulary", OVERSHOT, "one class ruined",
    }  # fmt: skip
    assert draft_files(bad[OVERSHOT]) == overshoot(draft_files(hybrid))
    assert unpack(bad["shuffled vocabulary"]).vocabulary.tolist() != unpack(hybrid).vocabulary.tolist()
    (fault,) = soundness.faults(bad["not finite"])
    assert any(f": {name} holds 1 numbers" in fault for name in CONFIG.shapes), fault


def test_a_draft_that_diverges_is_offered_to_nobody(hybrid: Files) -> None:
    def diverges(draft: Files) -> Files:
        raise TrainingDiverged("too fast")

    bad = dict(sabotaged(hybrid, np.random.default_rng(4), diverges))
    assert len(bad) == 5
    assert OVERSHOT not in bad
