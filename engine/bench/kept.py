"""What a run keeps as it goes, one JSON line each, so that one which was cut off goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.contracts import SlipstreamError


def kept_lines(path: Path) -> list[Any]:
    """What runs before have kept; nothing where there is no such file.

    A run that was killed may have left half a line at the end. It is taken off the file: what it said is made again,
    and what is added next stands on a line of its own.
    """
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    found = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise SlipstreamError(
                f"Line {number} of {path} is no JSON: {error}. Remove the file; what it keeps is made again."
            ) from error
    return found
