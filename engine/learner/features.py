"""What the target says about a stored sequence: the hidden states a draft reads and the distributions it learns.

Recomputed by a prefill over the token ids: nothing is transported from the engine, and what a version was trained on
can be made again from the traces alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.contracts import SlipstreamError
from engine.model.llama import Llama
from engine.model.states import hidden_states

ROWS = 128
KEPT = torch.bfloat16
"""Features are kept in two bytes a number: a buffer of conversations must fit beside the engine."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence of n tokens. Slot i in [0, n - 2) pairs x[i+1] with ``aux``[i] and predicts x[i+2].

    ``begin`` is the first slot whose prediction is response; ``aux`` [n - 2, 3 * hidden]; for the slots from ``begin``
    on, ``said`` [S, hidden] is what the target's head is applied to at i + 1, ``log_z`` [S] float32 the logarithm of
    its softmax denominator over the whole vocabulary.
    """

    token_ids: Tensor
    begin: int
    aux: Tensor
    said: Tensor
    log_z: Tensor

    @property
    def num_slots(self) -> int:
        return self.token_ids.shape[0] - 2

    @property
    def num_predictions(self) -> int:
        return self.num_slots - self.begin


def can_teach(prompt_ids: Sequence[int], output_ids: Sequence[int]) -> bool:
    """Whether there is a token to predict: the second of the response is the first that is ever drafted."""
    return len(prompt_ids) >= 1 and len(output_ids) >= 2


def example(
    model: Llama, prompt_ids: Sequence[int], output_ids: Sequence[int], aux_layers: Sequence[int], kept: torch.dtype
) -> Example:
    """The features of one response; ``kept`` is the dtype they are kept in."""
    if not can_teach(prompt_ids, output_ids):
        raise SlipstreamError(f"A response of {len(output_ids)} tokens has none that a draft could predict.")
    ids = [*prompt_ids, *output_ids]
    last, aux = hidden_states(model, ids, aux_layers)
    begin = len(prompt_ids) - 1
    with torch.inference_mode():
        said = model.normed(last[begin + 1 : len(ids) - 1])
        log_z = torch.cat([(part @ model.head.t()).float().logsumexp(-1) for part in said.split(ROWS)])
    # Copies made outside inference mode: autograd may not keep what was made inside.
    return Example(
        torch.tensor(ids), begin, _copy(aux[: len(ids) - 2], kept), _copy(said, kept), _copy(log_z, torch.float32)
    )


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype).copy_(x)
