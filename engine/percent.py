"""How a share is written, everywhere that people read one."""

from __future__ import annotations


def percent(share: float, digits: int = 0, sign: str = "") -> str:
    """.305 → "30 %", with ``digits`` = 1 "30.5 %"; ``sign`` "+" for a change. Binary halves round to even."""
    return f"{100.0 * share:{sign}.{digits}f} %"
