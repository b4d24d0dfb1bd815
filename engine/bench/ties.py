"""How far two passes over the same tokens differ in their logits, and how often that changes a greedy token.

A token that was served came from a pass of many rows; the auditor sees it again in one of a few tokens (``rescoring``).
Kernels sum in another order for another number of rows, so two logits that nearly tie may change places. The bound up
to which that is no error is set by what is measured here: above what kernels do, far below what a wrong token costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.bench.report import Figure, Report, quantile_figure, share_figure
from engine.bench.workload import Ids, workloads
from engine.contracts import SamplingParams
from engine.model.batch import Row
from engine.model.kv_cache import KVCache
from engine.model.llama import Llama
from engine.model.loading import Target, configured_target
from engine.ops.supervisor import Say
from engine.runner.engine import Engine, EngineRequest
from engine.runner.rescoring import Prefill, tie_bound
from engine.server.spare import PIECE_TOKENS
from engine.settings import Settings
from engine.speculation.ngram import NgramProposer

ROWS = 16
"""Requests that are served together."""
DRAFT = 4
"""Tokens verified beside a row's own in the pass ``verify``."""
CHUNK = 256


@dataclass(frozen=True, slots=True)
class Options:
    """``prompts`` of each class and ``tokens`` of each response at most, in every one of ``dtypes``."""

    files: tuple[Path, ...] = ()
    classes: tuple[str, ...] = ()
    prompts: int = 16
    tokens: int = 48
    longest: int = 512
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    seed: int = 0


@dataclass(slots=True)
class Seen:
    """Of one dtype, a list for each response: ``gaps`` of served tokens that the auditor's pass does not prefer, and
    ``margins`` between its best two logits everywhere. ``differences`` are the largest of any logit between its pass
    and each other kind of pass."""

    gaps: list[list[float]] = field(default_factory=list)
    margins: list[list[float]] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)


def run(settings: Settings, options: Options, say: Say) -> Report:
    figures, rng = list[Figure](), np.random.default_rng(options.seed)
    for dtype in options.dtypes:
        target = configured_target(settings, say, dtype)
        found = workloads(target, options.files, options.classes, 0, options.prompts, options.longest, options.seed)
        pairs = serve(target, [ids for work in found for ids in work.test], options.tokens)
        say(f"{dtype}: {len(pairs)} responses served, {ROWS} at a time; comparing passes")
        seen = compare(target.model, pairs)
        figures += _figures(dtype, seen, tie_bound(target.model.dtype), rng)
    return Report("ties", options.seed, figures)


def serve(target: Target, prompts: Sequence[Ids], tokens: int) -> list[tuple[Ids, Ids]]:
    """(prompt, greedy response) of an engine that speculates, many requests at a time."""
    engine = Engine(target, max_num_seqs=ROWS, max_model_len=max(map(len, prompts)) + tokens, max_queue=len(prompts))
    engine.load(1, NgramProposer(DRAFT))
    for n, ids in enumerate(prompts):
        engine.add(EngineRequest(str(n), ids, SamplingParams(tokens), 1))
    pairs = []
    while engine.has_work:
        for output in engine.step():
            if output.result is not None:
                pairs.append((output.result.payload.prompt_ids, output.result.payload.output_ids))
    return pairs


@torch.inference_mode()
def compare(model: Llama, pairs: Sequence[tuple[Ids, Ids]]) -> Seen:
    """The logits of every output position in four kinds of pass, over the tokens that were served."""
    seen = Seen()
    for first in range(0, len(pairs), ROWS):
        group = pairs[first : first + ROWS]
        others = {name: list(passes) for name, passes in _others(model, group).items()}
        for n, (prompt, output) in enumerate(group):
            audit = _audited(model, prompt, output)
            best = audit.topk(2, -1).values
            served = audit.gather(-1, torch.tensor(output, device=audit.device)[:, None])[:, 0]
            seen.margins.append((best[:, 0] - best[:, 1]).tolist())
            seen.gaps.append([gap for gap in (best[:, 0] - served).tolist() if gap > 0])
            for name, passes in others.items():
                most = float((passes[n] - audit[1:]).abs().max()) if len(output) > 1 else 0.0
                seen.differences[name] = max(most, seen.differences.get(name, 0.0))
    return seen


def _others(model: Llama, group: Sequence[tuple[Ids, Ids]]) -> Mapping[str, Iterator[Tensor]]:
    """Per kind of pass the logits [len(output) - 1, vocab] of each response, from its second token on.

    To be made one kind after the other: they share a cache, in which each writes over what the one before has written.
    """
    config, longest = model.config, max(len(p) + len(o) for p, o in group)
    cache = KVCache(config, len(group), longest, model.dtype, model.device)
    for slot, (prompt, _) in enumerate(group):
        for start in range(0, len(prompt), CHUNK):
            row = Row(slot, start, prompt[start : start + CHUNK])
            model.forward(model.lay_out([], [row], longest), cache)
    slots = dict(enumerate(group))
    return {
        "alone": (rows for slot, pair in slots.items() for rows in _decoded(model, cache, {slot: pair}, 1)),
        "batch": _decoded(model, cache, slots, 1),
        "verify": _decoded(model, cache, slots, 1 + DRAFT),
    }


def _decoded(model: Llama, cache: KVCache, group: Mapping[int, tuple[Ids, Ids]], width: int) -> Iterator[Tensor]:
    """Decode passes in which every response that goes on has ``width`` tokens, as the runner makes them."""
    config = model.config
    logits: dict[int, list[Tensor]] = {slot: [] for slot in group}
    for first in range(0, max(len(o) for _, o in group.values()) - 1, width):
        rows = [
            Row(slot, len(prompt) + first, output[first : min(first + width, len(output) - 1)])
            for slot, (prompt, output) in group.items()
            if first < len(output) - 1
        ]
        batch = model.lay_out(rows, [], cache.max_len)
        counts = [len(row.token_ids) for row in rows]
        made = model.logits(model.forward(batch, cache))[: sum(counts)].float()
        for row, part in zip(rows, made.split(counts), strict=True):
            logits[row.slot].append(part)
    empty = torch.empty(0, config.vocab_size, device=model.device)
    yield from (torch.cat(parts) if parts else empty for parts in logits.values())


def _audited(model: Llama, prompt: Ids, output: Ids) -> Tensor:
    """The logits [len(output), vocab] of all output positions in the auditor's passes."""
    ids = [*prompt, *output[:-1]]
    prefill = Prefill(model, KVCache(model.config, 1, len(ids), model.dtype, model.device), ids)
    states = list[Tensor]()
    while prefill.done < len(ids):
        states.append(prefill.advance(PIECE_TOKENS)[0])
    return torch.cat(
        [model.logits(piece) for piece in torch.cat(states)[len(prompt) - 1 :].split(PIECE_TOKENS)]
    ).float()


def _figures(dtype: str, seen: Seen, bound: float, rng: np.random.Generator) -> list[Figure]:
    """``audits_failed``: the share of responses that the auditor would have called wrong, though nothing was planted.

    Tokens of one response go together, so responses are what is resampled. A largest value has no upper end: more
    responses find larger ones, and how often they pass the bound is what ``audits_failed`` says.
    """
    failed = sum(max(gaps, default=0.0) > bound for gaps in seen.gaps)
    positions = [len(margins) for margins in seen.margins]
    near = [sum(margin <= bound for margin in margins) for margins in seen.margins]
    margins = np.concatenate([np.asarray(margins) for margins in seen.margins])
    largest = {"gap_max": max((gap for gaps in seen.gaps for gap in gaps), default=0.0), **seen.differences}
    return [
        share_figure(f"audits_failed:{dtype}", failed, len(seen.gaps)),
        _share_of_positions(f"served_differs:{dtype}", [len(gaps) for gaps in seen.gaps], positions, rng),
        _share_of_positions(f"best_two_within_bound:{dtype}", near, positions, rng),
        *(Figure(f"{name}:{dtype}", v, v, float("inf"), sum(positions), "logits") for name, v in largest.items()),
        Figure(f"bound:{dtype}", bound, bound, bound, 0, "logits"),
        *(quantile_figure(f"margin_p{q:g}:{dtype}", margins.tolist(), q / 100, "logits", rng) for q in (1, 5, 50)),
    ]


def _share_of_positions(name: str, events: Sequence[int], positions: Sequence[int], rng: np.random.Generator) -> Figure:
    """A ratio of sums with its percentile bootstrap over responses. Where no response has an event no resample has one;
    then the share of responses that have any bounds it, by Clopper–Pearson."""
    met, of = np.asarray(events, float), np.asarray(positions, float)
    if not met.any():
        return Figure(name, 0.0, 0.0, share_figure(name, 0, len(met)).high, len(met), "share")
    drawn = rng.integers(0, len(met), (2_000, len(met)))
    low, high = np.quantile(met[drawn].sum(1) / of[drawn].sum(1), (0.025, 0.975))
    return Figure(name, float(met.sum() / of.sum()), float(low), float(high), len(met), "share")
