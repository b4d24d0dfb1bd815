"""The target's own word on a response that was served: computed again without any draft, a few tokens at a time.

The response is given, so its tokens go through the target as a prompt does, and one pass judges many positions. Up to
the first difference that is exactly what plain decoding would have said (its inputs are the same), and beyond a tie it
goes on along the response that was served, where a decoded replay would have gone its own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.batch import Row
from engine.model.kv_cache import KVCache
from engine.model.llama import Llama

TIES = {torch.float64: 1e-9, torch.float32: 1e-2}
"""Logits that are nearer than this are equal: kernels differ by the number of rows, and sums end elsewhere."""
COARSE_TIE = 0.5
"""The same in 16 bits, where a logit of 20 is known to ± 0.06 before anything is summed."""


def tie_bound(dtype: torch.dtype) -> float:
    """Up to which distance two logits of this dtype are equal."""
    return TIES.get(dtype, COARSE_TIE)


class Prefill:
    """Known tokens through the target in pieces, in a cache that nobody else uses."""

    def __init__(self, model: Llama, cache: KVCache, token_ids: Sequence[int]) -> None:
        self.model, self.cache, self.token_ids = model, cache, token_ids
        self.done = 0

    @torch.inference_mode()
    def advance(self, most: int, layers: Sequence[int] = ()) -> tuple[Tensor, Tensor | None]:
        """The next ``most`` tokens at most: (hidden states [n, hidden], outputs of ``layers`` or None)."""
        row = Row(0, self.done, self.token_ids[self.done : self.done + most])
        model = self.model
        batch = model.lay_out([], [row], self.cache.max_len)
        states = model.forward_with_aux(batch, self.cache, layers)
        self.done = row.end
        return states


@dataclass(frozen=True, slots=True)
class Difference:
    """At output ``position`` stands ``served``, and the target prefers ``target`` by ``gap`` in its logits."""

    position: int
    served: int
    target: int
    gap: float


class Rescoring:
    """One greedy response against the target. ``mismatch`` is the first difference beyond a tie; ``ties`` counts those.

    The gap is from the best logit to that of the token served. So it is never less than the gap of the best two, and a
    wrong token is no tie because two others happen to be one.
    """

    def __init__(
        self,
        model: Llama,
        cache: KVCache,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        tie: float | None = None,
    ) -> None:
        """``cache`` has one slot, long enough; ``tie`` in logits, by the model's dtype where None."""
        self._prompt, self._output = len(prompt_ids), output_ids
        self._prefill = Prefill(model, cache, [*prompt_ids, *output_ids[:-1]])
        self.tie = tie if tie is not None else tie_bound(model.dtype)
        self.checked = self.ties = 0
        self.mismatch: Difference | None = None

    @property
    def is_done(self) -> bool:
        return self.mismatch is not None or self.checked == len(self._output)

    @torch.inference_mode()
    def advance(self, most: int) -> int:
        """Compute at most ``most`` tokens more; how many it were."""
        first = self._prefill.done
        hidden, _ = self._prefill.advance(most)
        skip = max(0, self._prompt - 1 - first)  # what follows a prompt's token, but for the last, is the prompt's
        if skip < hidden.shape[0]:
            self._judge(self._prefill.model.logits(hidden[skip:]))
        return self._prefill.done - first

    def _judge(self, logits: Tensor) -> None:
        best, choices = logits.max(-1)
        served = torch.tensor(self._output[self.checked : self.checked + logits.shape[0]], device=logits.device)
        gaps = (best - logits.gather(-1, served[:, None])[:, 0]).tolist()
        for token, choice, gap in zip(served.tolist(), choices.tolist(), gaps, strict=True):
            if token != choice and not gap <= self.tie:  # a gap that is no number is no tie
                self.mismatch = Difference(self.checked, token, choice, gap)
                return
            self.ties += token != choice
            self.checked += 1
