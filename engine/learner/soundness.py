"""What can be seen of a candidate without drafting with it: every number in its tensors is finite."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_FLOATS: dict[str, tuple[type[np.generic], int]] = {  # dtype → (its bits as whole numbers, mask of the exponent)
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}


def faults(files: Mapping[str, bytes]) -> list[str]:
    """Why these files cannot be a policy, by tensor; empty when nothing is wrong. bf16 is read by its bits."""
    from safetensors import SafetensorError, deserialize

    found = []
    for name, data in sorted(files.items()):
        if not name.endswith(".safetensors"):
            continue
        try:
            tensors = deserialize(data)
        except SafetensorError as error:
            found.append(f"it does not load: {name} is not a safetensors file: {error}")
            continue
        for tensor, info in tensors:
            if info["dtype"] not in _FLOATS:
                continue
            kind, exponent = _FLOATS[info["dtype"]]
            bits = np.frombuffer(info["data"], kind)
            if bad := int(((bits & kind(exponent)) == kind(exponent)).sum()):
                found.append(f"{name}: {tensor} holds {bad} numbers that are not finite, of {len(bits)}")
    return found
