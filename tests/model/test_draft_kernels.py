"""A draft in one call of C against the same draft by torch, with faults planted in its source."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.model import draft_kernels
from engine.model.draft import DraftConfig, DraftNetwork
from engine.model.draft_kernels import compile_draft
from engine.model.kernels import compile_kernels
from engine.model.llama import Llama
from engine.model.random_weights import TINY, random_llama
from engine.speculation.compiled_pool import CompiledPool
from engine.speculation.draft_pool import DraftPool, Proposal, Want
from engine.speculation.draft_pools import DraftPools
from engine.speculation.neural_file import DraftFile
from tests.model.planting import LATE, plant

CONFIG = replace(TINY, hidden_size=64, intermediate_size=96, num_heads=6, num_kv_heads=2, head_dim=64)
WORDS = 45  # no whole number of vectors
LENGTH, K = 96, 5
TOLERANCE = 0.08  # of a probability, of keys and of values; bfloat16 has eight bits
TEXTS = [
    torch.randint(0, CONFIG.vocab_size, (80,), generator=torch.Generator().manual_seed(i)).tolist() for i in (1, 2, 3)
]
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")


@pytest.fixture(scope="module")
def target() -> Llama:
    model = random_llama(CONFIG, dtype=torch.bfloat16)
    model.kernels = compile_kernels(model)
    assert model.kernels is not None
    return model


def drafted_by(target: Llama, seed: int = 0) -> DraftFile:
    """Of random weights, lively: what it says depends on all it sees."""
    config, random = DraftConfig.of_target(CONFIG, WORDS), torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=random) * (3.0 / shape[-1] ** 0.5 if len(shape) > 1 else 0.1)
        + (len(shape) == 1)
        for name, shape in config.shapes.items()
    }
    ids = torch.randperm(CONFIG.vocab_size, generator=random)[:WORDS].sort().values
    return DraftFile(config, weights, ids)


def network_of(target: Llama, seed: int = 0) -> DraftNetwork:
    file = drafted_by(target, seed)
    return DraftNetwork(file.config, file.weights, file.vocabulary, target)


def compiled(network: DraftNetwork, min_survival: float = 0.0) -> CompiledPool:
    kernels = compile_draft(network)
    assert kernels is not None
    return CompiledPool(network, 4, LENGTH, min_survival, kernels)


def states(count: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3 * CONFIG.hidden_size, generator=random).bfloat16()


def drive(pool: DraftPool, texts: list[list[int]], wanted: tuple[int, ...] = (K, 1, 3)) -> list[list[Proposal]]:
    """Drafts for requests that know more and more of their text: one slot waits, or several, or different numbers."""
    begun = [pool.start(text[: 20 + i]) for i, text in enumerate(texts)]
    for i, state in enumerate(begun):
        pool.feed([(state, 0, states(19 + i, i))])
    found = []
    for turn in range(4):
        found.append(pool.propose([Want(state, k) for state, k in zip(begun, wanted, strict=False)]))
        for i, (state, text) in enumerate(zip(begun, texts, strict=True)):
            more, known = 1 + (turn + i) % 3, len(state.tokens)
            state.tokens.extend(text[known : known + more])
            pool.feed([(state, known - 1, states(more, 100 + known))])
    return found


def off(network: DraftNetwork) -> float:
    """By how much probabilities, keys and values differ from torch's; no number where the tokens do."""
    worst = 0.0
    for min_survival in (0.0, 0.007):
        plain, quick = DraftPool(network, 4, LENGTH, min_survival), compiled(network, min_survival)
        for want, got in zip(drive(plain, TEXTS), drive(quick, TEXTS), strict=True):
            for one, other in zip(want, got, strict=True):
                if one.tokens != other.tokens:
                    return float("nan")
                worst = max(worst, *(abs(a / b - 1) for a, b in zip(one.confidence, other.confidence, strict=True)))
        for own, his in (
            (plain.cache.flat_keys[0], quick.cache.flat_keys[0]),
            (plain.cache.flat_values[0], quick.cache.flat_values[0]),
        ):
            own, his = own[: plain.cache.nowhere].float(), his[: plain.cache.nowhere].float()
            worst = max(worst, float((own - his).norm() / own.norm()))
    return worst


def test_a_draft_is_what_torch_drafts(target: Llama) -> None:
    assert off(network_of(target)) < TOLERANCE


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("chain->step ? r : chain->ends[r] - 1", "r"),
        ("(chain.step ? r : ends[r] - 1) * size", "r * size"),
        ("hidden + slot * size", "hidden + r * size"),
        ("chain->who[going] = i", "chain->who[going] = r"),
        ("chain->positions[slot] + 1", "chain->positions[slot]"),
        ("chain->places[slot] + 1", "chain->places[slot]"),
        ("counts[i] >= wanted[i]", "counts[i] >= 1"),
        ("chain->survival[i] >= least", "answers[r].chance >= least"),
        ("tokens[t] * size", "(tokens[t] ^ 1) * size"),
        ("draft->layer.attention_norm, both", "draft->embedding_norm, both"),
        ("both + (2 * t + 1) * size", "both + 2 * t * size"),
        ("draft->norm, h", "draft->layer.mlp_norm, h"),
        ("x = larger(x, OTHER(x, 2));", "(void)0;"),
        ("most = one > most ? one : most", "most = most"),  # the likeliest is among the last, which fill no vector
        ("total += exponential(all(alone(logits[i]) - most))[0]", "total += 0"),
        ("{vocabulary[at],", "{at,"),
        ("aux, NUM_AUX * n, size", "aux, NUM_AUX * n - 1, size"),
        ("times(both, &draft->layer.qkv, product_room, qkv, n, &team)", "(void)times"),  # what a prompt left there
    ],
)
def test_a_fault_in_the_draft_is_seen(
    target: Llama, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(draft_kernels, right, wrong, tmp_path, monkeypatch)
    assert not off(network_of(target)) < TOLERANCE


def test_threads_that_come_late_follow(
    target: Llama, threads: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain, which all read, has changed by then unless all are waited for."""
    plant(draft_kernels, *LATE, tmp_path, monkeypatch)
    threads(3)
    assert off(network_of(target)) < TOLERANCE


@pytest.mark.parametrize("kernels", [True, False])
def test_states_are_kept_though_the_next_pass_writes_where_they_were(target: Llama, kernels: bool) -> None:
    """As captured passes do."""
    network, drafts = network_of(target), list[list[Proposal]]()
    for overwritten in (False, True):
        pool = compiled(network) if kernels else DraftPool(network, 4, LENGTH, 0.0)
        state, aux = pool.start(TEXTS[0][:9]), states(8, 0)
        pool.feed([(state, 0, aux)])
        if overwritten:
            aux.zero_()
        drafts.append(pool.propose([Want(state, K)]))
    assert drafts[0] == drafts[1]


def test_a_draft_whose_layer_no_vectors_fit_is_run_by_torch(target: Llama) -> None:
    file = drafted_by(target)
    config = replace(file.config, intermediate_size=40)
    weights = {name: torch.zeros(shape) for name, shape in config.shapes.items()}
    assert compile_draft(DraftNetwork(config, weights, file.vocabulary, target)) is None


def test_a_request_gets_alone_what_it_gets_beside_others(target: Llama) -> None:
    """To the last bit."""
    network = network_of(target)
    together = drive(compiled(network), TEXTS)
    alone = drive(compiled(network), TEXTS[:1], (K,))
    assert [turn[0] for turn in together] == [turn[0] for turn in alone]


def test_the_number_of_threads_changes_no_bit(target: Llama, threads: Callable[[int], None]) -> None:
    network = network_of(target)
    threads(1)
    alone = drive(compiled(network), TEXTS)
    for count in (2, 3, 7):
        threads(count)
        assert drive(compiled(network), TEXTS) == alone, count


def test_a_draft_that_is_no_number_says_one_token_and_ends(target: Llama) -> None:
    network = network_of(target)
    for weight in network.weights.values():
        weight.fill_(float("nan"))
    broken = DraftNetwork(network.config, network.weights, network.vocabulary, target)
    for turn in drive(compiled(broken), TEXTS):
        for proposal in turn:
            assert len(proposal.tokens) == 1
            assert proposal.tokens[0] in network.vocabulary.tolist()


def test_an_engine_drafts_by_the_kernels_where_its_target_runs_by_them(
    target: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = DraftPools(target, 2, LENGTH).take(drafted_by(target), 0.2)
    assert isinstance(taken, CompiledPool)
    monkeypatch.setattr(target, "kernels", None)
    assert type(DraftPools(target, 2, LENGTH).take(drafted_by(target), 0.2)) is DraftPool


def test_what_does_not_compile_is_run_by_torch(target: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "draft.c").write_text("int broken(")
    monkeypatch.setattr(draft_kernels, "SOURCE", tmp_path / "draft.c")
    assert compile_draft(network_of(target)) is None
