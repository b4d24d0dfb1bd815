"""A stand-in for CUDA graphs on a CPU, as strict as they are.

Capturing writes down every operation with the very tensors it ran on. Replaying runs those operations on those tensors
and puts each result where it was: no Python of the captured function runs again, and nothing that it did not touch when
it was captured can be read or written. What waits for the device, or lets a shape depend on data, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_to_cpu", "equal", "is_nonzero")
"""Parts of names of operations that need the data on the host."""


class NotCapturable(RuntimeError):
    pass


class Tape:
    """A ``graphs.Capture``. ``captures`` and ``replays`` count."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, body: Callable[[], object]) -> Callable[[], object]:
        self.captures += 1
        for _ in range(2):  # as the warm-up of a real capture does
            body()
        recording = _Recording()
        with recording:
            body()
        operations = recording.operations

        @torch.inference_mode()
        def replay() -> None:
            self.replays += 1
            for operation, arguments, keywords, results in operations:
                for old, new in zip(results, _tensors(operation(*arguments, **keywords)), strict=True):
                    if old is not new and _storage(old) != _storage(new):
                        old.copy_(new)

        return replay


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(part in str(operation) for part in WAITS):
            raise NotCapturable(f"{operation} needs data on the host")
        if any(t.dtype == torch.bool for t in _tensors((args, kwargs))) and "index.Tensor" in str(operation):
            raise NotCapturable(f"{operation} by a mask has a shape that depends on data")
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, _tensors(result)))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
