"""``x @ weight.T`` for the few rows of a decoding step, where the order of the product decides the speed.

In float32 on a CPU, BLAS reads the weights at full bandwidth when they are the left factor, and at down to a quarter
of it when they are the right one. Linear layers of SmolLM2-135M, two cores of an AMD EPYC, MKL 2024.2, milliseconds:

    rows              1    2    3    4    5    8   10   12   16   32   64
    F.linear         40   68   88   63   67   64   87   76   79  111  160
    (W @ x.T).T      40   17   25   25   32   41   65   73   59   85  144

One row goes to a matrix-vector kernel that is slower than two rows through this one, and 10 to 15 rows cost more than
16; so these are filled up. Other dtypes and devices have no such trouble.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_ROWS = 64
_FILL = {1: 2} | dict.fromkeys(range(10, 16), 16)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[rows, in] and [out, in] → [rows, out], contiguous."""
    rows = x.shape[0]
    if rows > _MOST_ROWS or x.dtype != torch.float32 or x.device.type != "cpu":
        return F.linear(x, weight)
    filled = _FILL.get(rows, rows)
    if filled != rows:
        x = F.pad(x, (0, 0, 0, filled - rows))
    return (weight @ x.t())[:, :rows].t().contiguous()
