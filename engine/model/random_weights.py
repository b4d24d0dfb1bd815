"""A Llama with random weights: for tests, and for benchmarks of shapes whose weights are not at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.config import LlamaConfig
from engine.model.llama import Llama, tensor_shapes

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=256,
    tie_embeddings=False,
)


def random_tensors(
    config: LlamaConfig, seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> dict[str, Tensor]:
    """A checkpoint under Hugging Face names; norms near 1, the rest normal with deviation 1/sqrt(fan-in).

    Untied configs make the livelier models: tied to random embeddings, a model mostly repeats its input.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
        if name.endswith("norm.weight"):
            tensors[name] = (1 + 0.1 * noise).to(dtype)
        else:
            tensors[name] = (noise if "embed" in name else noise * shape[-1] ** -0.5).to(dtype)
    return tensors


def random_llama(
    config: LlamaConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Llama:
    return Llama.from_checkpoint(config, random_tensors(config, seed, dtype, device), dtype, torch.device(device))
