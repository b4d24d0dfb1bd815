"""Exactness of sampling: the joint law of the first K + 1 output tokens, by enumeration, against the target's.

With a tiny vocabulary everything can be counted: the draws u enter through a midpoint grid, which is exact when every
probability is a multiple of the grid. The known ways to get it wrong are kept as mutants, and each must be caught.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.speculation import verify
from engine.speculation.verify import (
    VerifyOutcome,
    sample,
    target_probabilities,
    verify_greedy,
    verify_one_hot,
    verify_sampled,
)

V, K, GRID = 3, 2, 20
Verify = Callable[[Tensor, Sequence[int], Tensor, Sequence[float]], VerifyOutcome]
OneHot = Callable[[Tensor, Sequence[int], Sequence[float]], VerifyOutcome]
CHOSEN = (0, 1)
"""What a deterministic proposer drafts."""


def law(seed: int) -> Callable[[tuple[int, ...]], Tensor]:
    """A random next-token law that depends on the whole prefix; probabilities are multiples of 1 / GRID."""

    def next_token(prefix: tuple[int, ...]) -> Tensor:
        rng = np.random.default_rng([seed, len(prefix), *prefix])
        cuts = np.sort(rng.choice(np.arange(0, GRID + 1), V - 1))
        return torch.tensor(np.diff([0, *cuts, GRID]) / GRID, dtype=torch.float32)

    return next_token


target, other = law(1), law(2)


def joint(verify_fn: Verify, draft_law: Callable[[tuple[int, ...]], Tensor]) -> dict[tuple[int, ...], float]:
    """Law of the first K + 1 tokens where drafts are drawn from ``draft_law``."""
    mass: dict[tuple[int, ...], float] = defaultdict(float)
    for drafts in itertools.product(range(V), repeat=K):
        q = torch.stack([draft_law(drafts[:i]) for i in range(K)])
        weight = float(torch.stack([q[i, t] for i, t in enumerate(drafts)]).prod())
        if not weight:
            continue
        p = torch.stack([target(drafts[:i]) for i in range(K + 1)])
        for tokens, share in continued(emitted(verify_fn, p, drafts, q)).items():
            mass[tokens] += weight * share
    return mass


def joint_one_hot(verify_fn: OneHot) -> dict[tuple[int, ...], float]:
    """The same for a deterministic proposer. The grid is exact: probabilities are multiples of 1 / GRID."""
    p = torch.stack([target(CHOSEN[:i]) for i in range(K + 1)])
    out: dict[tuple[int, ...], float] = defaultdict(float)
    grid = [(i + 0.5) / GRID for i in range(GRID)]
    for uniforms in itertools.product(grid, repeat=K + 1):
        out[verify_fn(p, CHOSEN, uniforms).tokens] += GRID ** -(K + 1)
    return continued(out)


def continued(step: dict[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
    """What one verify step emits, continued by the target to K + 1 tokens where it stopped early."""
    mass: dict[tuple[int, ...], float] = defaultdict(float)
    for tokens, share in step.items():
        for rest in itertools.product(range(V), repeat=K + 1 - len(tokens)):
            tail = 1.0
            for i, token in enumerate(rest):
                tail *= float(target((*tokens, *rest[:i]))[token])
            mass[(*tokens, *rest)] += share * tail
    return mass


def emitted(verify_fn: Verify, p: Tensor, drafts: tuple[int, ...], q: Tensor) -> dict[tuple[int, ...], float]:
    """Law of the tokens of one verify step over all uniforms, each on a midpoint grid fine enough for every ratio."""
    grid = [(i + 0.5) / 60 for i in range(60)]
    tests = []
    for i, token in enumerate(drafts):
        # Only whether u lies under the ratio matters; cut [0, 1) there and use one u of each side with its length.
        q_token = float(q[i, token])
        cuts = sorted(
            {0.0, 1.0, min(1.0, float(p[i, token]) / q_token), min(1.0, q_token / max(1e-9, float(p[i, token])))}
        )
        tests.append([((a + b) / 2, b - a) for a, b in itertools.pairwise(cuts) if b > a])
    out: dict[tuple[int, ...], float] = defaultdict(float)
    for choice in itertools.product(*tests):
        weight = float(np.prod([w for _, w in choice]))
        uniforms = [u for u, _ in choice]
        for u in grid:
            out[verify_fn(p, drafts, q, [*uniforms, u]).tokens] += weight / len(grid)
    return out


def wanted() -> dict[tuple[int, ...], float]:
    return {
        tokens: float(np.prod([float(target(tokens[:i])[t]) for i, t in enumerate(tokens)]))
        for tokens in itertools.product(range(V), repeat=K + 1)
    }


def distance(found: dict[tuple[int, ...], float]) -> float:
    """Total variation distance from the target's law."""
    true = wanted()
    return sum(abs(found.get(tokens, 0.0) - true.get(tokens, 0.0)) for tokens in true | found) / 2


TOLERANCE = 0.012  # the grid of 1/60 for the last draw costs up to .007; the mildest mutant is at .028


@pytest.mark.parametrize("draft_law", [other, target], ids=["drawn", "same as target"])
def test_the_joint_law_is_the_targets(draft_law: Callable[[tuple[int, ...]], Tensor]) -> None:
    assert distance(joint(verify_sampled, draft_law)) < TOLERANCE


def test_the_joint_law_of_a_deterministic_proposer_is_the_targets() -> None:
    assert distance(joint_one_hot(verify_one_hot)) < 1e-6


def one_hot_mutant(
    *, row: Callable[[int], int] = lambda i: i, draw: Callable[[int], int] = lambda i: i, accept: bool = False
) -> OneHot:
    def run(p: Tensor, drafts: Sequence[int], uniforms: Sequence[float]) -> VerifyOutcome:
        tokens: list[int] = []
        for i in range(len(drafts) + 1):
            tokens.append(sample(p[row(i)], uniforms[draw(i)]))
            if accept and i < len(drafts):
                tokens[i] = drafts[i]
            if i == len(drafts) or tokens[i] != drafts[i]:
                break
        return VerifyOutcome(len(tokens) - 1, tuple(tokens))

    return run


ONE_HOT_MUTANTS = {
    "accept always": one_hot_mutant(accept=True),
    "the row before": one_hot_mutant(row=lambda i: max(i - 1, 0)),
    "wrong bonus row": one_hot_mutant(row=lambda i: min(i, K - 1)),
    "one uniform for all": one_hot_mutant(draw=lambda i: 0),
}


@pytest.mark.parametrize("name", ONE_HOT_MUTANTS)
def test_the_enumeration_catches_one_hot_mutants(name: str) -> None:
    assert distance(joint_one_hot(one_hot_mutant())) < 1e-6
    assert distance(joint_one_hot(ONE_HOT_MUTANTS[name])) > 0.02


def test_what_is_drafted_changes_no_token_that_is_drawn() -> None:
    p = torch.stack([target(()), target((0,)), target((0, 1))])
    for uniforms in itertools.product(np.linspace(0.05, 0.95, 7), repeat=3):
        plain = verify_one_hot(p, [], uniforms[:1]).tokens[0]
        for draft in range(V):
            assert verify_one_hot(p, [draft], uniforms[:2]).tokens[0] == plain


def mutant(
    *,
    accept: Callable[[float, float, float], bool] = lambda u, p, q: u * q < p,
    residual: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    bonus_row: int = -1,
    draft_temperature: float = 1.0,
) -> Verify:
    def run(p: Tensor, drafts: Sequence[int], q: Tensor, uniforms: Sequence[float]) -> VerifyOutcome:
        if draft_temperature != 1.0:
            q = (q.log() / draft_temperature).softmax(-1)
        for i, token in enumerate(drafts):
            if accept(uniforms[i], float(p[i, token]), float(q[i, token])):
                continue
            weights = residual(p, q, i) if residual is not None else verify._residual(p[i], q[i])
            return VerifyOutcome(i, (*drafts[:i], sample(weights, uniforms[-1])))
        return VerifyOutcome(len(drafts), (*drafts, sample(p[bonus_row], uniforms[-1])))

    return run


def test_the_mutant_frame_itself_is_right() -> None:
    assert distance(joint(mutant(), other)) < TOLERANCE


MUTANTS = {
    "flipped comparison": mutant(accept=lambda u, p, q: u * q > p),
    "ratio upside down": mutant(accept=lambda u, p, q: u * p < q),
    "accept always": mutant(accept=lambda u, p, q: True),
    "no residual": mutant(residual=lambda p, q, i: p[i]),
    "residual of the wrong row": mutant(residual=lambda p, q, i: verify._residual(p[i + 1], q[i])),
    "wrong bonus row": mutant(bonus_row=-2),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_enumeration_catches_mutants(name: str) -> None:
    assert distance(joint(MUTANTS[name], other)) > 2 * TOLERANCE


def test_the_enumeration_catches_q_at_another_temperature() -> None:
    assert distance(joint(mutant(draft_temperature=0.5), other)) > 2 * TOLERANCE


def test_draws_that_follow_the_target_are_all_accepted() -> None:
    p = torch.stack([target(()), target((1,)), target((1, 2))])
    for u in np.linspace(0, 0.999, 50):
        drafts = [int(p[0].argmax()), int(p[1].argmax())]
        assert verify_sampled(p, drafts, p[:2], [u, u, u]).accepted == 2


def test_residual_that_vanishes_falls_back_to_p() -> None:
    p = torch.tensor([0.25, 0.75])
    assert torch.equal(verify._residual(p, p.clone()), p)
    certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert verify_one_hot(certain, [1], [0.5, 0.5]) == VerifyOutcome(0, (0,))
    assert verify_one_hot(certain, [0], [0.999999, 0.5]) == VerifyOutcome(1, (0, 1))


def test_sample_never_draws_a_zero_and_survives_the_last_uniform() -> None:
    weights = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0])
    assert {sample(weights, u) for u in np.linspace(0, 1, 101)} == {1, 3}
    assert sample(weights, 0.0) == 1


def test_greedy_keeps_the_longest_agreeing_prefix_and_adds_one() -> None:
    assert verify_greedy([5, 6, 7], [5, 6]) == VerifyOutcome(2, (5, 6, 7))
    assert verify_greedy([5, 6, 7], [5, 9]) == VerifyOutcome(1, (5, 6))
    assert verify_greedy([5], []) == VerifyOutcome(0, (5,))


def test_target_probabilities() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]], dtype=torch.float64)
    plain = target_probabilities(logits, 1.0)
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain, logits.float().softmax(-1))
    torch.testing.assert_close(target_probabilities(logits, 0.5), (2 * logits.float()).softmax(-1))
    assert (target_probabilities(logits, 1.0, top_k=2) > 0).tolist() == [[False, True, True, False]]
    assert (target_probabilities(logits, 1.0, top_p=0.5) > 0).tolist() == [[False, True, False, False]]
    assert (target_probabilities(logits, 1.0, top_p=0.7) > 0).tolist() == [[False, True, True, False]]
    assert (target_probabilities(logits, 1.0, top_p=1e-9) > 0).sum() == 1
    assert float(target_probabilities(logits, 1.0, top_k=3, top_p=0.9).sum()) == pytest.approx(1)


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-45, 5e-324])
def test_the_coldest_temperatures_draw_the_likeliest_token(temperature: float) -> None:
    p = target_probabilities(torch.tensor([[40.0, -3.0, 41.0], [-1.0, -2.0, -5.0]]), temperature)
    assert p.tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
