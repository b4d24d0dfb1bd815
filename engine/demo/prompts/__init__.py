"""The small prompt set the project ships: four traffic classes, 48 prompts each, in Spec-Bench's JSONL shape."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from engine.contracts import TRAFFIC_CLASSES


@dataclass(frozen=True, slots=True)
class Prompt:
    traffic_class: str
    turns: tuple[str, ...]


def shipped() -> dict[str, list[Prompt]]:
    """Prompts by traffic class."""
    folder = resources.files(__name__)
    return {name: _parse((folder / f"{name}.jsonl").read_text()) for name in TRAFFIC_CLASSES}


def read(path: Path) -> list[Prompt]:
    """Prompts of any file in Spec-Bench's shape."""
    return _parse(path.read_text())


def _parse(text: str) -> list[Prompt]:
    rows = (json.loads(line) for line in text.splitlines() if line.strip())
    return [Prompt(row["traffic_class"], tuple(row["turns"])) for row in rows]
