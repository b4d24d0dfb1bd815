"""What rehearsals are remembered by."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import torch

from engine.learner.trainer import fresh_weights
from engine.model.draft import DraftConfig, DraftNetwork
from engine.model.random_weights import TINY, random_llama
from engine.speculation.rehearsal import Rehearsals

TARGET = random_llama()
CONFIG = DraftConfig.of_target(TINY, 16)


def network(config: DraftConfig = CONFIG, seed: int = 0) -> DraftNetwork:
    return DraftNetwork(config, fresh_weights(config, TARGET, seed), torch.arange(config.vocab_size), TARGET)


def test_a_draft_is_named_by_all_that_decides_what_it_proposes() -> None:
    names, first = Rehearsals(), network()
    assert names.name(first) == names.name(first) == names.name(network())
    assert names.name(first) != names.name(network(seed=1))
    low, middle, high = CONFIG.aux_layers
    other = replace(CONFIG, aux_layers=(high, middle, low) if low != high else (0, 0, 0))
    assert other != CONFIG
    moved = DraftNetwork(other, first.weights, first.vocabulary, TARGET)
    assert names.name(first) != names.name(moved), "the same weights, over other layers"


def test_a_name_holds_no_draft() -> None:
    names, draft = Rehearsals(), network()
    names.name(draft)
    gone = weakref.ref(draft)
    del draft
    gc.collect()
    assert gone() is None
