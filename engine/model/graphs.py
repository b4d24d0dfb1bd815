"""Passes of fixed shapes over fixed storage, prepared once and run again: CUDA graphs.

What is captured is a function without arguments. It reads and writes tensors that live on, calls nothing that waits for
the device, and no shape in it depends on data. A graph knows addresses, not Python: weights change under it by being
copied into the tensors it was captured with.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import torch

Body = Callable[[], object]
WARM_UP = 3
"""Runs before a capture: libraries load kernels and take their workspaces then, which a capture must not see."""


class Capture(Protocol):
    def __call__(self, body: Body) -> Body:
        """What does the same as ``body``, again and again. May run ``body`` itself any number of times."""
        ...


class CudaCapture:
    """Captures into CUDA graphs. They share one memory pool, so they must run one after the other, on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Body) -> Body:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    body()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Threads that load a policy meanwhile may allocate: only what this thread does is forbidden.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                body()
        return graph.replay


class TimedCapture:
    """A capture that counts the ``seconds`` it took: whoever comes first waits for them, no pass costs them."""

    def __init__(self, capture: Capture, clock: Callable[[], float]) -> None:
        self._capture, self._clock, self.seconds = capture, clock, 0.0

    def __call__(self, body: Body) -> Body:
        began = self._clock()
        try:
            return self._capture(body)
        finally:
            self.seconds += self._clock() - began


def uncaptured(body: Body) -> Body:
    """The same passes, called from Python every time."""
    return body


def graphs_on(device: torch.device) -> Capture | None:
    """How passes of fixed shapes run on ``device``; None where they are laid out anew for every step, on a CPU."""
    return CudaCapture(device) if device.type == "cuda" else None


def no_graphs_on(device: torch.device) -> Capture | None:
    """``graphs_on`` where graphs are switched off."""
    return uncaptured if device.type == "cuda" else None


class Graphs:
    """One prepared pass for each key."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._prepared: dict[Hashable, Body] = {}

    def get(self, key: Hashable, body: Body, park: Body) -> Body:
        """The pass ``key``. The first time it is captured, after ``park`` has left nothing but padding in its inputs:

        capturing runs it, and what stands in them else would be computed into places that meanwhile are another's.
        """
        if key not in self._prepared:
            park()
            self._prepared[key] = self._capture(body)
        return self._prepared[key]

    def __len__(self) -> int:
        return len(self._prepared)
