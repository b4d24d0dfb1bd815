"""One verify step on this device: how near it comes to reading the weights once, and what capturing it saves.

A step is what the engine does between drafting and committing (``runner/target_pass``): inputs to the device, the pass,
the verdict, and the wait for it. Its floor is the time that the weights take to be read once, at the bandwidth of a
large copy on this device. On CUDA captured steps and the same steps called kernel by kernel take turns; on a CPU there
is one kind. Then new weights are put in place of a target's and a draft's, and what was captured with the old ones must
answer as the same passes called kernel by kernel.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.bench.report import Figure, Report, quantile_figure
from engine.contracts import SamplingParams, SlipstreamError
from engine.learner.trainer import fresh_weights
from engine.model.config import LlamaConfig
from engine.model.draft import NUM_AUX, DraftConfig
from engine.model.graphs import Capture, graphs_on, uncaptured
from engine.model.int8 import GROUP, Int8Panels
from engine.model.kv_cache import KVCache
from engine.model.llama import Llama, tensor_shapes
from engine.model.loading import DTYPES, INT8, best_dtype, configured_target
from engine.model.random_weights import TINY, random_tensors
from engine.ops.supervisor import Say
from engine.runner.captured_pass import CapturedPass
from engine.runner.target_pass import EagerPass, TargetPass
from engine.scheduler.scheduler import ScheduledStep
from engine.scheduler.sequence import Sequence as SequenceState
from engine.settings import Settings
from engine.speculation.draft_pool import Want
from engine.speculation.draft_pools import DraftPools
from engine.speculation.neural_file import DraftFile
from engine.speculation.verify import VerifyOutcome

OWN = "own"
SHAPES: Mapping[str, LlamaConfig] = {
    "1b": LlamaConfig(128_256, 2048, 8192, 16, 32, 8, 64, 131_072, 500_000.0),
    "3b": LlamaConfig(128_256, 3072, 8192, 28, 24, 8, 128, 131_072, 500_000.0),
    "8b": LlamaConfig(128_256, 4096, 14_336, 32, 32, 8, 128, 131_072, 500_000.0, tie_embeddings=False),
    "tiny": TINY,
}
"""The shapes of Llama 3.1 and 3.2, for random weights; tiny is for tests."""
DRAFT_VOCABULARY = 8_192
COPIED_BYTES = {"cuda": 2**31, "cpu": 2**28}
COPIES = 8
SWAPS = 5


@dataclass(frozen=True, slots=True)
class Options:
    shapes: tuple[str, ...] = (OWN, "1b", "8b")
    rows: tuple[int, ...] = (1, 4, 16)
    drafted: tuple[int, ...] = (0, 4, 8)
    keys: int = 240
    repeats: int = 50
    seed: int = 0


def run(settings: Settings, options: Options, say: Say) -> Report:
    unknown = sorted(set(options.shapes) - {OWN, *SHAPES})
    if unknown:
        raise SlipstreamError(f"There are no shapes {unknown}; there are {[OWN, *SHAPES]}.")
    rng = np.random.default_rng(options.seed)
    chosen = settings.engine.device
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if chosen == "auto" else chosen)
    bandwidths = bandwidth(device)
    figures = [quantile_figure("copy_bandwidth", bandwidths, 0.5, "GB/s", rng)]
    for shape in options.shapes:
        model = _model(settings, shape, device, options.seed, say)
        figures += _Steps(shape, model, figures[0].value, options, rng, say, graphs_on(device)).figures()
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return Report("step", options.seed, figures)


def bandwidth(device: torch.device) -> list[float]:
    """GB/s of large copies on ``device``, bytes read and written."""
    size = COPIED_BYTES[device.type]
    here, there = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    there.copy_(here)
    return [2 * size / _seconds(lambda: there.copy_(here), device) / 1e9 for _ in range(COPIES)]


def weight_bytes(model: Llama) -> int:
    """Bytes of weights that a pass reads: all but the rows of the embedding that no token asks for."""
    shapes = tensor_shapes(model.config)
    read = sum(int(np.prod(shape)) for name, shape in shapes.items() if "embed_tokens" not in name)
    if model.config.tie_embeddings:  # it is the head
        read += model.config.vocab_size * model.config.hidden_size
    if isinstance(model.layers[0].out, Int8Panels):  # with a scale in bfloat16 to each group
        return read + read * torch.bfloat16.itemsize // GROUP
    return read * model.dtype.itemsize


def _model(settings: Settings, shape: str, device: torch.device, seed: int, say: Say) -> Llama:
    if shape == OWN:
        return configured_target(settings, say).model
    dtype = DTYPES[
        best_dtype(device.type, settings.engine.kernels) if settings.engine.dtype == "auto" else settings.engine.dtype
    ]
    int8 = settings.engine.weights == INT8
    say(f"random weights of shape {shape}")
    tensors = random_tensors(SHAPES[shape], seed, dtype, str(device))
    return Llama.from_checkpoint(SHAPES[shape], tensors, dtype, device, settings.engine.kernels, int8)


class _Greedy:
    sampling = SamplingParams(1)

    def uniforms(self, count: int) -> list[float]:
        raise AssertionError("a greedy request draws nothing")


class _Steps:
    def __init__(
        self,
        name: str,
        model: Llama,
        gb_per_s: float,
        options: Options,
        rng: np.random.Generator,
        say: Say,
        capture: Capture | None,
    ) -> None:
        self.name, self.model, self.options, self.rng, self.say = name, model, options, rng, say
        self.floor_ms = weight_bytes(model) / gb_per_s / 1e6
        self.longest = options.keys + 1 + max(options.drafted)
        cache = KVCache(model.config, max(options.rows), self.longest, model.dtype, model.device)
        self.captures: list[Capture | None] = [None]
        self.ways: dict[str, TargetPass] = {"eager": EagerPass(model, cache)}
        if capture is not None:
            self.captures = [capture, uncaptured]
            self.ways = {
                "captured": CapturedPass(model, cache, capture),
                "eager": CapturedPass(model, cache, uncaptured),
            }

    def figures(self) -> list[Figure]:
        figures = [Figure(f"floor_ms:{self.name}", self.floor_ms, self.floor_ms, self.floor_ms, 1, "ms")]
        for rows in self.options.rows:
            for drafted in self.options.drafted:
                self.say(f"{self.name}: {rows} × {1 + drafted} tokens")
                figures += self._sized(rows, drafted)
        return figures + self._swaps()

    def _sized(self, rows: int, drafted: int) -> list[Figure]:
        step, at = self._step(rows, drafted), f"{self.name}:{rows}x{1 + drafted}"
        for way in self.ways.values():  # the first captures, the second is the first of many
            step(way)
            step(way)
        took: dict[str, list[float]] = {name: [] for name in self.ways}
        for _ in range(self.options.repeats):
            for name, way in self.ways.items():
                took[name].append(1e3 * _seconds(lambda way=way: step(way), self.model.device))  # type: ignore[misc]
        figures = []
        for name, ms in took.items():
            figures.append(quantile_figure(f"step_ms:{at}:{name}", ms, 0.5, "ms", self.rng))
            over = [one / self.floor_ms for one in ms]
            figures.append(quantile_figure(f"ratio:step/floor:{at}:{name}", over, 0.5, "x", self.rng))
        if "captured" in took:
            pairs = [e / c for e, c in zip(took["eager"], took["captured"], strict=True)]
            figures.append(quantile_figure(f"ratio:eager/captured:{at}", pairs, 0.5, "x", self.rng))
        return figures

    def _step(self, rows: int, drafted: int) -> Callable[[TargetPass], list[VerifyOutcome]]:
        """A step of ``rows`` greedy requests, each with ``keys`` tokens behind it."""
        tokens = self.rng.integers(0, self.model.config.vocab_size, (rows, self.options.keys + 1 + drafted)).tolist()
        scheduled = ScheduledStep()
        for slot, ids in enumerate(tokens):
            seq = SequenceState(str(slot), ids[: self.options.keys + 1], 1 + drafted)
            seq.slot, seq.num_computed = slot, self.options.keys
            scheduled.decodes.append(seq)
        drafts, lives = [ids[self.options.keys + 1 :] for ids in tokens], {str(slot): _Greedy() for slot in range(rows)}

        @torch.inference_mode()
        def step(way: TargetPass) -> list[VerifyOutcome]:
            return way(scheduled, drafts, lives, ()).outcomes

        return step

    def _swaps(self) -> list[Figure]:
        """Seconds until new weights, in host memory, stand in the place of the old; the graphs must go on with them."""
        model, seed = self.model, self.options.seed + 1
        figures = [self._swap("draft", self._draft_swap(seed))]
        tensors = random_tensors(model.config, seed, model.dtype, str(model.device))
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        step = self._step(max(self.options.rows), max(self.options.drafted))
        self._agree("target", [step(way) for way in self.ways.values()])
        try:
            figures.append(self._swap("target", lambda: model.copy_weights(tensors)))
        except SlipstreamError as error:
            self.say(f"{self.name}: no swap of the target measured. {error}")
        self._agree("target", [step(way) for way in self.ways.values()])
        return figures

    def _swap(self, what: str, swap: Callable[[], None]) -> Figure:
        took = [1e3 * _seconds(swap, self.model.device) for _ in range(SWAPS)]
        return quantile_figure(f"swap_ms:{self.name}:{what}", took, 0.5, "ms", self.rng)

    def _draft_swap(self, seed: int) -> Callable[[], None]:
        """A swap to new weights; before it is handed out, it was done once, and the draft asked before and after."""
        model, old, new = self.model, self._draft(seed - 1), self._draft(seed)
        ways = [DraftPools(model, 1, self.longest, capture) for capture in self.captures]
        for draft in (old, new):
            self._agree("draft", [_drafted(pools, draft) for pools in ways])

        def swap() -> None:
            ways[0].give_back(ways[0].take(new, 0.0))

        return swap

    def _draft(self, seed: int) -> DraftFile:
        target = self.model.config
        config = DraftConfig.of_target(target, min(DRAFT_VOCABULARY, target.vocab_size))
        weights = {name: tensor.half().cpu() for name, tensor in fresh_weights(config, self.model, seed).items()}
        return DraftFile(config, weights, torch.arange(config.vocab_size, dtype=torch.int32))

    def _agree(self, what: str, answers: Sequence[object]) -> None:
        if any(answer != answers[0] for answer in answers):
            raise SlipstreamError(
                f"{self.name}: captured passes of the {what} do not answer as the same passes called kernel by kernel: "
                f"{answers}. After a swap this means that they go on with the old weights."
            )


def _drafted(pools: DraftPools, draft: DraftFile) -> list[int]:
    """What a pool of ``draft`` drafts after two tokens, with noise for the target's states of the first."""
    pool = pools.take(draft, 0.0)
    target = pool.network.target
    state = pool.start([0, 1])
    width = NUM_AUX * target.config.hidden_size
    noise = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    pool.feed([(state, 0, noise.to(target.device, target.dtype))])
    tokens = pool.propose([Want(state, 1)])[0].tokens
    pool.end(state)
    pools.give_back(pool)
    return tokens


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
