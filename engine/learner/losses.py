"""What a draft is taught by: losses between its distribution q and the target's p, row by row.

The head is frozen and the vocabulary large, so logits are made, differentiated and dropped a few rows at a time: memory
is bounded by ``CHUNK`` rows, and the head's product is made once forward and once back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.model.draft_unroll import launches_cost

CHUNK = 256
WIDE_CHUNK = 4096
"""Where launches cost more than memory."""
RowLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits [R, vocab], p [R, vocab], the target's probabilities of these tokens: they sum to at most 1) → [R]."""


def forward_kl(logits: Tensor, p: Tensor) -> Tensor:
    """KL(p || q) up to p's entropy. What p gives to tokens outside the draft's vocabulary weighs nothing."""
    return -(p * logits.log_softmax(-1)).sum(-1)


def reverse_kl(logits: Tensor, p: Tensor) -> Tensor:
    """KL(q || p), p normalised over the draft's vocabulary and floored: q must not be where p is not."""
    log_q = logits.log_softmax(-1)
    log_p = (p / p.sum(-1, keepdim=True).clamp_min(1e-9)).clamp_min(1e-9).log()
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def lk_alpha(logits: Tensor, p: Tensor) -> Tensor:
    """-log α, where α = Σ min(p, q) is the probability that a draft drawn from q is accepted (arXiv 2602.23881)."""
    return -_alpha(logits, p).clamp_min(1e-9).log()


def lk_hybrid(logits: Tensor, p: Tensor) -> Tensor:
    """λ KL(p || q) + (1 - λ) (1 - α) with λ = exp(-3 α): KL while little is accepted, then the acceptance itself."""
    alpha = _alpha(logits, p)
    share = (-3 * alpha.detach()).exp()
    return share * forward_kl(logits, p) + (1 - share) * (1 - alpha)


def _alpha(logits: Tensor, p: Tensor) -> Tensor:
    return torch.minimum(p, logits.softmax(-1)).sum(-1)


LOSSES: dict[str, RowLoss] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "lk_alpha": lk_alpha,
    "lk_hybrid": lk_hybrid,
}


def head_loss(
    hidden: Tensor,
    said: Tensor,
    log_z: Tensor,
    head: Tensor,
    truth: Tensor,
    weights: Callable[[Tensor], Tensor],
    loss: RowLoss,
) -> tuple[Tensor, Tensor]:
    """(weighted sum of the rows' losses, which rows the draft's best token is the truth [R] bool).

    ``hidden`` and ``said`` [R, h]: what the ``head`` [vocab, h] is applied to by draft and target; ``truth`` [R]: the
    token that followed, as a place in the draft's vocabulary, -1 where it is not in it. ``weights``: from the rows
    that were right, [R] bool, to the weight of each row.
    """
    total, right = _HeadLoss.apply(hidden, said, log_z, head, truth, weights, loss)
    return total, right


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        said: Tensor,
        log_z: Tensor,
        head: Tensor,
        truth: Tensor,
        weights: Callable[[Tensor], Tensor],
        loss: RowLoss,
    ) -> tuple[Tensor, Tensor]:
        losses, gradients, rights = [], [], []
        chunk = WIDE_CHUNK if launches_cost(hidden.device) else CHUNK
        for first in range(0, hidden.shape[0], chunk):
            rows = slice(first, first + chunk)
            logits = (hidden[rows] @ head.t()).requires_grad_()
            p = (said[rows] @ head.t() - log_z[rows, None]).exp_()
            with torch.enable_grad():
                values = loss(logits, p)
                (gradient,) = torch.autograd.grad(values.sum(), logits)
            losses.append(values.detach())
            gradients.append(gradient @ head)
            rights.append(logits.detach().argmax(-1) == truth[rows])
        right = torch.cat(rights)
        weight = weights(right)
        ctx.save_for_backward(torch.cat(gradients) * weight[:, None])
        ctx.mark_non_differentiable(right)
        return (torch.cat(losses) * weight).sum(), right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None, None, None
