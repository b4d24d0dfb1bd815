"""The memory learner: the same bytes whatever way its traces came, weighted by age, never without bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.contracts import SlipstreamError
from engine.learner.memory import BLOCK, UNIT, MemoryLearner, MemoryRecipe, build_memory, rebuild_memory
from engine.settings import LearnerSettings
from engine.speculation.artifact import read_manifest
from engine.speculation.memory import MEMORY_FILE, Lookup, TraceMemory
from engine.speculation.memory_build import POOLED
from engine.store.repositories.intake import TrainableTrace
from tests.learner.test_gate import TARGET, traffic

RECIPE = MemoryRecipe(max_bytes=1_000_000, half_life=2 * BLOCK)


@pytest.fixture
def train() -> list[TrainableTrace]:
    return traffic(np.random.default_rng(0), 300)


def test_counted_as_it_came_is_counted_at_once(train: list[TrainableTrace]) -> None:
    grown = MemoryLearner()
    for end in (10, 11, 130, 300):
        data = grown.learn(train[:end], RECIPE)
        assert data == MemoryLearner().learn(train[:end][::-1], RECIPE)
    window = train[100:250]  # the oldest have left a buffer
    assert grown.learn(window, RECIPE) == MemoryLearner().learn(window, RECIPE) != data


def test_only_what_changed_is_counted_again(train: list[TrainableTrace], monkeypatch: pytest.MonkeyPatch) -> None:
    import engine.learner.memory as module

    counted, count = [], module.count_pairs

    def watched(responses: object, *orders: int) -> object:
        found = list(responses)  # type: ignore[call-overload]
        counted.append(len(found))
        return count(found, *orders)

    monkeypatch.setattr(module, "count_pairs", watched)
    learner = MemoryLearner()
    learner.learn(train[:298], RECIPE)
    assert sum(counted) == 298
    counted.clear()
    learner.learn(train, RECIPE)
    assert sum(counted) < 2 * BLOCK


def test_a_sighting_counts_half_after_a_half_life_of_its_own_class_and_is_never_forgotten() -> None:
    def at(ordinal: int, name: str, position: int, token: int) -> TrainableTrace:
        base = traffic(np.random.default_rng(0), 1)[0]
        return replace(
            base, ordinal=ordinal, traffic_class=name, position=position, prompt_ids=[1, 2], output_ids=[token]
        )

    def confidence(traces: list[TrainableTrace], name: str) -> tuple[int, int]:
        table = TraceMemory.parse(MemoryLearner().learn(traces, RECIPE)).classes[name]
        found = Lookup([table], UNIT).next_after((1, 2))
        assert found is not None
        return found[0], max(table.count)

    old, new = at(1, "chat", 0, 5), at(2, "chat", 2 * BLOCK, 6)
    assert confidence([old], "chat") == (5, UNIT)
    assert confidence([old, new], "chat") == (6, UNIT)  # 5 counts half by now
    assert confidence([old, old, old, replace(new, position=2 * BLOCK)], "chat") == (5, 3 * UNIT // 2)
    assert confidence([old, replace(new, traffic_class="code")], "chat") == (5, UNIT)  # other classes do not age it
    assert RECIPE.weight(10**6) == 1


def test_all_classes_together_stand_behind_a_class_that_is_new(train: list[TrainableTrace]) -> None:
    tables = TraceMemory.parse(MemoryLearner().learn(train, RECIPE)).classes
    assert set(tables) == {"chat", "code", POOLED}
    assert len(tables[POOLED]) >= max(len(tables["chat"]), len(tables["code"]))


def test_bytes_are_bounded(train: list[TrainableTrace]) -> None:
    small = replace(RECIPE, max_bytes=20_000)
    assert len(MemoryLearner().learn(train, small)) <= 20_000


def test_a_manifest_says_how_to_make_the_memory_again(train: list[TrainableTrace]) -> None:
    files = build_memory(train, TARGET, LearnerSettings(memory_half_life=99))
    lineage = {"lineage": read_manifest(files).lineage}
    assert rebuild_memory(train[::-1], lineage) == files[MEMORY_FILE]
    with pytest.raises(SlipstreamError, match="not those that made this version"):
        rebuild_memory(train[1:], lineage)
