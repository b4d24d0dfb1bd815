"""From a model's name to a target ready to run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.contracts import SlipstreamError
from engine.model.config import LlamaConfig
from engine.model.int8 import Int8Panels
from engine.model.kernels import compile_kernels
from engine.model.linear import multiplies_bfloat16
from engine.model.llama import Llama
from engine.model.product import multiplies
from engine.model.tokenizer import Tokenizer
from engine.model.weights import fingerprint, read_llama, resolve_model, tokenizer_fingerprint
from engine.settings import Settings

log = logging.getLogger(__name__)
AUTO = "auto"
INT8 = "int8"
CHECKPOINT = "checkpoint"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class Target:
    """A target model with its tokenizer. ``fingerprint`` ties policies to it (config, tokenizer and weights)."""

    model: Llama
    tokenizer: Tokenizer
    config: LlamaConfig
    fingerprint: str
    tokenizer_fingerprint: str
    name: str
    folder: Path


def load_target(
    model: str,
    cache_dir: Path,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
    kernels: bool = True,
    weights: str = CHECKPOINT,
) -> Target:
    """Find or fetch ``model`` (a folder, a Hugging Face id, or the packaged default) and load it.

    ``dtype`` "auto" takes what is fastest here (``best_dtype``), ``device`` "auto" CUDA where there is one.
    ``threads`` None or 0 leaves torch's own choice. ``kernels``: compile those of ``kernels.py``, ``product.py`` and
    ``int8.py`` where they can be. ``weights`` "int8" rounds the checkpoint's matrices: another model, whatever its
    dtype, and faster where ``int8.py`` multiplies them.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == AUTO:
        dtype = best_dtype(device, kernels)
    if dtype not in DTYPES:
        raise SlipstreamError(f"dtype must be {AUTO} or one of {sorted(DTYPES)}, got {dtype!r}.")
    if weights not in (CHECKPOINT, INT8):
        raise SlipstreamError(f"weights must be {CHECKPOINT} or {INT8}, got {weights!r}.")
    int8 = weights == INT8
    if threads:
        torch.set_num_threads(threads)
    folder = resolve_model(model, cache_dir, progress)
    config = LlamaConfig.from_folder(folder)
    progress(f"loading {model} as {dtype}{', weights rounded to int8,' if int8 else ''} on {device}")
    name = Path(model).name if Path(model).is_dir() else model
    llama = read_llama(folder, config, DTYPES[dtype], device, kernels, int8)
    if int8 and dtype == "bfloat16" and not isinstance(llama.layers[0].out, Int8Panels):
        log.warning(
            "weights int8 are held in bfloat16 here, which is no faster: their product is for a CPU that has none for "
            "bfloat16 of its own, with a C compiler and engine.kernels"
        )
    if kernels:
        llama.kernels = compile_kernels(llama)
    return Target(
        model=llama,
        tokenizer=Tokenizer(folder),
        config=config,
        fingerprint=fingerprint(folder, int8),
        tokenizer_fingerprint=tokenizer_fingerprint(folder),
        name=name,
        folder=folder,
    )


def configured_target(settings: Settings, progress: Callable[[str], None], dtype: str | None = None) -> Target:
    """The target that these settings name; ``dtype`` in place of theirs."""
    chosen = settings.engine
    return load_target(
        chosen.model,
        settings.dir("models"),
        dtype or chosen.dtype,
        chosen.device,
        chosen.threads,
        progress,
        chosen.kernels,
        chosen.weights,
    )


def best_dtype(device: str, kernels: bool = True) -> str:
    """bfloat16 where hardware or our product multiply it.

    Half the bytes; faster for the few rows of a decoding step, no faster for a prefill chunk (docs/log.md).
    """
    if device != "cpu":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if multiplies_bfloat16() or (kernels and multiplies()) else "float32"
