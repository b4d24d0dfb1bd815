"""Drafts for all rows of a step, and what the target then said for those who draft from it.

Requests of one policy that reads hidden states are drafted for in the same passes; all others draft each on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.runner.live import Draft, Live
from engine.speculation.proposer import HiddenReader, asked_of


def draft_together(
    lives: Sequence[Live], limits: Sequence[int], vocab_size: int, clock: Callable[[], float]
) -> tuple[list[Draft], list[float]]:
    """(a draft of at most so many tokens for each, seconds each took). Shared passes are split by tokens asked for.

    ``limits`` bound what takes time; a part of a policy that takes none may always say all it knows.
    """
    drafts, took = [Draft([])] * len(lives), [0.0] * len(lives)
    mosts = [live.most_asked(limit) for live, limit in zip(lives, limits, strict=True)]
    asked = [i for i in range(len(lives)) if mosts[i] > 0]
    groups = list(_by_reader(asked, lives))
    alone = sorted(set(range(len(lives))) - {i for _, members in groups for i in members})
    for reader, members in groups:
        began = clock()
        try:
            made = reader.propose([(lives[i].drafter, mosts[i], limits[i]) for i in members])
        except Exception:  # somebody's state is wrong: let each try by itself, so that only that one is without
            alone += members
            continue
        for i, tokens in zip(members, made, strict=True):
            drafts[i] = lives[i].drafted(limits[i], tokens, vocab_size)
        seconds = clock() - began
        shares = [asked_of(reader.parts - 1, drafts[i].said) for i in members]
        if not sum(shares):  # nobody made a pass
            shares = [1] * len(members)
        for i, share in zip(members, shares, strict=True):
            took[i] = seconds * share / sum(shares)
    for i in alone:
        began = clock()
        drafts[i] = lives[i].draft(limits[i], vocab_size)
        took[i] = clock() - began
    return drafts, took


@dataclass(frozen=True, slots=True)
class Heard:
    """Rows [first, last) of a pass are the tokens of ``live`` at positions ``start``…, all of them its own for good."""

    live: Live
    start: int
    first: int
    last: int


def feed_together(heard: Sequence[Heard], layers: Sequence[int], aux: Tensor) -> None:
    """Hand ``aux`` [N, len(layers) * hidden], the outputs of ``layers``, to the drafters that read them."""
    states = aux.view(aux.shape[0], len(layers), -1)
    for reader, members in _by_reader(range(len(heard)), [h.live for h in heard]):
        wanted = [layers.index(layer) for layer in reader.aux_layers]
        own = aux if wanted == list(range(len(layers))) else torch.cat([states[:, i] for i in wanted], -1)
        fed = [(heard[i].live.drafter, heard[i].start, own[heard[i].first : heard[i].last]) for i in members]
        try:
            reader.feed(fed)
        except Exception:
            for i, one in zip(members, fed, strict=True):  # what was taken already is passed over
                try:
                    reader.feed([one])
                except Exception:
                    heard[i].live.draft_failed()


def _by_reader(places: Sequence[int], lives: Sequence[Live]) -> Iterator[tuple[HiddenReader, list[int]]]:
    """Those of ``places`` whose drafters read hidden states, grouped by policy."""
    groups: dict[int, tuple[HiddenReader, list[int]]] = {}
    for i in places:
        reader = lives[i].reader
        if reader is not None and lives[i].drafter is not None:
            groups.setdefault(id(reader), (reader, []))[1].append(i)
    yield from groups.values()
