"""Verification: which drafted tokens the target keeps, and the token it adds. Exact for greedy and for sampling.

Speculative sampling after Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (2302.01318): accept a draft x
iff u < p(x) / q(x); after a rejection sample from norm(max(p - q, 0)); when all are accepted, sample one more from p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COLDEST = 1e-6
"""Temperatures below draw the likeliest token all the same, and float32 cannot divide by them."""


@dataclass(frozen=True, slots=True)
class VerifyOutcome:
    """``tokens``: the ``accepted`` first drafts and one more, recovered or bonus."""

    accepted: int
    tokens: tuple[int, ...]


def verify_greedy(choices: Sequence[int], drafts: Sequence[int]) -> VerifyOutcome:
    """``choices`` [k + 1]: the target's argmax at each drafted position and after the last."""
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == choices[accepted]:
        accepted += 1
    return VerifyOutcome(accepted, tuple(choices[: accepted + 1]))


def verify_one_hot(p: Tensor, drafts: Sequence[int], uniforms: Sequence[float]) -> VerifyOutcome:
    """One row whose drafts were not drawn but chosen: q is one-hot.

    ``p`` [k + 1, vocab] float32: the target's distributions. Position i draws its token from p[i] by ``uniforms[i]``,
    and a draft is accepted iff it is the token drawn. That is rejection sampling: a draft x is accepted with
    probability p(x) = min(1, p(x) / q(x)), and what is drawn instead follows p without x, the residual. And the tokens
    depend on the uniforms alone: whatever was drafted, and however much of it, a seed gives the same response.
    """
    tokens: list[int] = []
    for i, uniform in enumerate(uniforms):
        tokens.append(sample(p[i], uniform))
        if i == len(drafts) or tokens[i] != drafts[i]:
            break
    return VerifyOutcome(len(tokens) - 1, tuple(tokens))


def verify_sampled(p: Tensor, drafts: Sequence[int], q: Tensor, uniforms: Sequence[float]) -> VerifyOutcome:
    """Rejection sampling of one row whose drafts were drawn.

    ``p`` [k + 1, vocab] float32: the target's distributions. ``q`` [k, vocab]: exactly what each draft was drawn from.
    ``uniforms`` [k + 1] in [0, 1): one for each draft's test, the last for the token that is added, so that a row's
    tokens depend on nothing but its own generator.
    """
    for i, token in enumerate(drafts):
        if uniforms[i] * float(q[i, token]) < float(p[i, token]):
            continue
        recovered = sample(_residual(p[i], q[i]), uniforms[-1])
        return VerifyOutcome(i, (*drafts[:i], recovered))
    return VerifyOutcome(len(drafts), (*drafts, sample(p[len(drafts)], uniforms[-1])))


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p - q, 0) [vocab], not normalised; p itself where nothing is left (p = q up to rounding)."""
    residual = (p - q).clamp_(min=0.0)
    return residual if float(residual.sum()) > 0 else p


def sample(weights: Tensor, uniform: float) -> int:
    """Inverse CDF in float64. ``weights`` [vocab] need no normalisation; a token of weight 0 is never drawn."""
    w = weights.double().cpu().numpy()
    cdf = np.cumsum(w)
    index = int(np.searchsorted(cdf, uniform * cdf[-1], side="right"))
    if index < len(w):
        return index
    return int(np.flatnonzero(w)[-1])  # uniform * total rounded up to total


def target_probabilities(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """[rows, vocab] float32 probabilities under temperature, then top-k, then top-p (the order of vLLM and HF).

    ``top_k`` 0 keeps the whole vocabulary. top-p keeps the smallest set whose mass reaches it, never fewer than one.
    """
    logits = logits.float()
    # Differences to the largest: what is divided stays below 0, and no temperature makes inf - inf of it.
    scaled = (logits - logits.amax(-1, keepdim=True)) / max(temperature, COLDEST)
    if 0 < top_k < scaled.shape[-1]:
        kept, at = scaled.topk(top_k, dim=-1)
        scaled = torch.full_like(scaled, float("-inf")).scatter_(-1, at, kept)
    probs = scaled.softmax(-1)
    if top_p < 1.0:
        ordered, at = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # mass of what is likelier
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, at, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw_tokens(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    """[N] tokens drawn on the device: row for row ``sample(target_probabilities(…), uniform)``.

    ``logits`` [N, vocab]; ``temperature`` [N], ``top_p`` [N] and ``uniforms`` [N] float64, ``top_k`` [N] int64.
    """
    vocab = logits.shape[-1]
    logits = logits.float()
    divisor = temperature.clamp(min=COLDEST).float()[:, None]
    scaled = (logits - logits.amax(-1, keepdim=True)) / divisor
    ordered, at = scaled.sort(dim=-1, descending=True, stable=True)
    kept = top_k.masked_fill(top_k <= 0, vocab)[:, None]
    ordered = ordered.masked_fill(torch.arange(vocab, device=logits.device) >= kept, float("-inf")).softmax(-1)
    before = ordered.cumsum(-1) - ordered
    cut = (top_p < 1.0)[:, None] & (before >= top_p.float()[:, None])
    weights = torch.zeros_like(ordered).scatter_(-1, at, ordered.masked_fill(cut, 0.0)).double()
    cdf = weights.cumsum(-1)
    index = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)[:, 0]
    last = vocab - 1 - (weights > 0).flip(-1).int().argmax(-1)  # of those that can be drawn
    return torch.minimum(index, last)


def accepted_counts(choices: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """[rows] drafts that the target keeps, on the device: ``verify_greedy``, and ``verify_one_hot`` of drawn choices.

    ``choices`` [rows, width]: the target's token after each place; ``tokens`` [rows, width]: an input and its drafts;
    ``counts`` [rows]: how many of them there are.
    """
    place = torch.arange(1, tokens.shape[1], device=tokens.device)
    kept = (choices[:, :-1] == tokens[:, 1:]) & (place < counts[:, None])
    return kept.long().cumprod(1).sum(1)
