"""The engine: requests go in, outputs come out, one ``step`` at a time. One thread owns it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.contracts import Status
from engine.runner.request import EngineRequest, Output, RequestResult
from engine.speculation.proposer import Proposer

if TYPE_CHECKING:
    from engine.model.loading import Target

__all__ = ["Engine", "EngineRequest", "Output", "RequestResult"]


class Engine:
    def __init__(
        self,
        target: Target,
        *,
        max_num_seqs: int = 16,
        max_model_len: int = 2048,
        prefill_chunk: int = 256,
        max_queue: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        raise NotImplementedError

    def load(self, version: int, proposer: Proposer) -> None:
        """Make a policy resident. Replacing a version in place is refused."""
        raise NotImplementedError

    def unload(self, version: int) -> None:
        """Forget a policy; requests that began with it keep it to their end."""
        raise NotImplementedError

    @property
    def resident(self) -> tuple[int, ...]:
        raise NotImplementedError

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises QueueFull, RequestTooLong or another SlipstreamError; then nothing was queued."""
        raise NotImplementedError

    def cancel(self, request_id: str, status: Status = Status.CANCELLED) -> Output | None:
        """End a request now and free its slot; its last output with its result, or None if it is unknown."""
        raise NotImplementedError

    def step(self) -> list[Output]:
        raise NotImplementedError

    @property
    def has_work(self) -> bool:
        raise NotImplementedError

    def stats(self) -> dict[str, int]:
        """Gauges and counters: running, waiting, draft_errors, step_errors."""
        raise NotImplementedError
