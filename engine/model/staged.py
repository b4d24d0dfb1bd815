"""Small numbers between host and device, without the host waiting for the device.

A copy from ordinary memory makes the host wait; one from page-locked memory does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(
    values: Sequence[int] | Sequence[float] | Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``values`` on ``device``."""
    host = torch.tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


class Staged:
    """``size`` numbers on the device, ``device`` [size], and their page-locked copy, ``host`` (numpy).

    ``host`` may be written again once a ``fetch`` has come back after the last ``send``.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.device = torch.zeros(size, dtype=dtype, device=device)
        self._host = torch.zeros(size, dtype=dtype, pin_memory=cuda)
        self.host = self._host.numpy()
        self._here = torch.cuda.Event() if cuda else None

    def send(self, count: int) -> None:
        """Copy the first ``count`` numbers to the device, in the order of its stream."""
        self.device[:count].copy_(self._host[:count], non_blocking=True)

    def fetch(self, count: int) -> list[int] | list[float]:
        """The first ``count`` numbers of the device. The one place where a step waits for it."""
        self._host[:count].copy_(self.device[:count], non_blocking=True)
        if self._here is not None:
            self._here.record()
            self._here.synchronize()
        numbers: list[int] | list[float] = self.host[:count].tolist()
        return numbers
