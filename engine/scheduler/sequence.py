"""A sequence as the scheduler sees it: plain integers."""

from __future__ import annotations

from collections.abc import Sequence as Seq

NO_SLOT = -1


class Sequence:
    """``token_ids`` are the prompt and what was committed after it; ``num_computed`` of them have keys and values.

    While it decodes, exactly the last token is not computed: it is the first input of the next verify step. The first
    ``num_prefill`` tokens are computed in chunks: the prompt, and after a preemption also what had been put out.
    """

    __slots__ = (
        "client",
        "max_tokens",
        "num_computed",
        "num_prefill",
        "num_prompt",
        "preemptions",
        "request_id",
        "slot",
        "token_ids",
    )

    def __init__(self, request_id: str, prompt_ids: Seq[int], max_tokens: int, client: str = "") -> None:
        self.request_id = request_id
        self.client = client
        self.token_ids = list(prompt_ids)
        self.num_prompt = self.num_prefill = len(prompt_ids)
        self.max_tokens = max_tokens
        self.num_computed = 0
        self.preemptions = 0
        self.slot = NO_SLOT

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def remaining(self) -> int:
        return self.max_tokens - self.num_output

    @property
    def in_prefill(self) -> bool:
        return self.num_computed < self.num_prefill

    def preempt(self) -> None:
        """Its keys and values are gone: they are computed again, those of its output too."""
        self.num_prefill = len(self.token_ids) - 1 if self.num_output else self.num_prompt
        self.num_computed = 0
        self.preemptions += 1
        self.slot = NO_SLOT

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}, slot={self.slot}, computed={self.num_computed}/{len(self.token_ids)}, "
            f"output={self.num_output}/{self.max_tokens}, preemptions={self.preemptions})"
        )
