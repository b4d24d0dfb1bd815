"""Responses with verify steps for the seeded traces, and the small tokenizer that writes them as text."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer, models

from engine.contracts import TracePayload, VerifyStep

TEXTS = {
    "code": (
        "def mean ( values : list [ float ] ) -> float :\n    total = 0.0\n    for value in values :\n        "
        "total += value\n    return total / len ( values )\n\n\ndef spread ( values : list [ float ] ) -> float :\n    "
        "centre = mean ( values )\n    return mean ( [ abs ( value - centre ) for value in values ] )\n"
    ),
    "chat": (
        "A slipstream is the calm air behind a rider . Sit close to the wheel in front and you save about a third of "
        "your effort ; drift two metres back and most of it is gone . On a climb the air matters less , because you "
        "ride slower , so the gain shrinks . In a bunch the riders in the middle save the most of all ."
    ),
}
SPLIT = {name: [w if w.startswith("\n") else f" {w}" for w in _.split(" ")] for name, _ in TEXTS.items()}
PIECES = sorted({piece for pieces in SPLIT.values() for piece in pieces})
NUMBER = {piece: number for number, piece in enumerate(PIECES)}


def write_tokenizer(path: Path) -> None:
    """A tokenizer.json in which every piece of the texts is one token."""
    Tokenizer(models.WordLevel(NUMBER, unk_token=PIECES[0])).save(str(path))


def response(traffic_class: str, tokens: int, rate: float, rng: random.Random) -> TracePayload:
    """A response of about so many tokens; each drafted token is accepted with probability ``rate``."""
    text = [NUMBER[piece] for piece in SPLIT["code" if traffic_class in ("code", "batch") else "chat"]]
    output, steps = [text[0]], []
    while len(output) < tokens:
        ahead = [text[(len(output) + i) % len(text)] for i in range(5)]
        drafted = rng.choice((0, 2, 4, 4)) if rate else 0
        accepted = 0
        while accepted < drafted and rng.random() < rate + 0.3 * (rate > 0) * (accepted == 0):
            accepted += 1
        wrong = [rng.choice([t for t in range(len(PIECES)) if t != right]) for right in ahead[accepted:drafted]]
        steps.append(VerifyStep((*ahead[:accepted], *wrong), accepted, accepted + 1))
        output += ahead[: accepted + 1]
    return TracePayload(tuple(text[:12]), tuple(output), tuple(steps))
