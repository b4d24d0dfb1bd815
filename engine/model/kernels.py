"""The layers of a pass in one call of C, for bfloat16 on a CPU: compiled at start for the model's shape (layers.c).

Without a C compiler, or for a model that they do not know, there is torch.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.model import int8, product
from engine.model.batch import Batch
from engine.model.compiler import COUNT, POINTER, compile_function
from engine.model.crew import Crew
from engine.model.int8 import Int8Panels
from engine.model.kv_cache import KVCache
from engine.model.linear import Weight
from engine.model.llama import Layer, Llama
from engine.model.product import Panels

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("layers.c")
LANES = 16


class MatrixParts(ctypes.Structure):
    _fields_ = (
        ("prepare", POINTER), ("product", POINTER), ("grain", POINTER), ("weights", POINTER), ("scales", POINTER),
        ("inputs", COUNT), ("outputs", COUNT), ("panels", COUNT),
    )  # fmt: skip


class LayerParts(ctypes.Structure):
    _fields_ = (
        ("attention_norm", POINTER), ("mlp_norm", POINTER), ("qkv_bias", POINTER), ("qk_norm", POINTER),
        ("qkv", MatrixParts), ("out", MatrixParts), ("gate_up", MatrixParts), ("down", MatrixParts),
    )  # fmt: skip


class Shape(ctypes.Structure):
    _fields_ = (
        ("cos", POINTER), ("sin", POINTER), ("hidden", COUNT), ("kv_heads", COUNT), ("eps", ctypes.c_double),
    )  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = (("shape", Shape), ("layers", ctypes.POINTER(LayerParts)))


def compile_kernels(model: Llama) -> Kernels | None:
    """Kernels for ``model``; None, with the reason in the log, where torch must do it."""
    config = model.config
    if model.dtype != torch.bfloat16 or model.device.type != "cpu":
        return None
    shaped = not (config.head_dim % (2 * LANES) or config.hidden_size % LANES or config.intermediate_size % LANES)
    held = all(isinstance(matrix, Panels | Int8Panels) for layer in model.layers for matrix in _matrices(layer))
    if not shaped or not held:
        log.info("no kernels for a model of this shape: torch runs its layers")
        return None
    shape = {"HEAD_DIM": config.head_dim, "GROUP": config.group_size}
    run = compile_function(SOURCE, "forward", shape, POINTER, COUNT, *[POINTER] * 5, COUNT, POINTER, COUNT,
                           *[POINTER] * 4, COUNT, POINTER)  # fmt: skip
    return None if run is None else Kernels(run, model)


class Kernels:
    def __init__(self, run: Callable[..., None], model: Llama) -> None:
        """The model's weights, and so ``model``, must stay where they are."""
        config = model.config
        self._run, self._hidden, self._inter = run, config.hidden_size, config.intermediate_size
        self.crew = Crew()
        self._qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self._heads = config.num_heads * config.head_dim
        made = [
            LayerParts(
                layer.attention_norm.data_ptr(),
                layer.mlp_norm.data_ptr(),
                None if layer.qkv_bias is None else layer.qkv_bias.data_ptr(),
                None if layer.qk_norm is None else layer.qk_norm.data_ptr(),
                *map(matrix_parts, _matrices(layer)),
            )
            for layer in model.layers
        ]
        self._product_room = max(product_room(matrix) for layer in model.layers for matrix in _matrices(layer))
        self._layers = (LayerParts * len(made))(*made)
        self._model = _Model(shape_of(model, config.num_kv_heads), self._layers)

    def forward(
        self, x: Tensor, batch: Batch, cache: KVCache, aux_layers: Sequence[int], depth: int
    ) -> tuple[Tensor, Tensor | None]:
        """As ``Llama.forward_with_aux``, from embeddings ``x`` [N, hidden], which are written over."""
        n, hidden = x.shape
        assert n, "C has no tile for no rows"
        assert all(layer < depth for layer in aux_layers), f"{depth} layers give out nothing of {aux_layers}"
        aux = torch.tensor(aux_layers, dtype=torch.int64)
        given = x.new_empty(n, len(aux_layers) * hidden)
        wide = max(self._qkv + self._heads, 3 * self._inter)  # of a token at a time: attention's, then the MLP's
        room = x.new_empty(n * (2 * hidden + wide))
        product_room = torch.empty(n * self._product_room, dtype=torch.uint8)
        starts = torch.empty(n + 1, dtype=torch.int64)
        took = (ctypes.c_double * 2)()
        keys, values = cache.flat_keys, cache.flat_values
        self.crew.muster()
        self._run(
            ctypes.byref(self._model), depth, x.data_ptr(), batch.positions.data_ptr(), batch.places.data_ptr(),
            keys[0].data_ptr(), values[0].data_ptr(), keys[0].numel(), aux.data_ptr(), len(aux_layers),
            given.data_ptr(), room.data_ptr(), starts.data_ptr(), product_room.data_ptr(), n, took,
        )  # fmt: skip
        self.crew.observe(*took)
        return x, given if aux_layers else None


def shape_of(model: Llama, num_kv_heads: int) -> Shape:
    """What a layer must know beside its weights, the target's or one that stands on it."""
    config = model.config
    return Shape(model.cos.data_ptr(), model.sin.data_ptr(), config.hidden_size, num_kv_heads, config.rms_norm_eps)


def matrix_parts(weight: Weight) -> MatrixParts:
    """A matrix as C multiplies by it; it must stay where it is."""
    assert isinstance(weight, Panels | Int8Panels)
    if isinstance(weight, Int8Panels):
        parts, scales = int8.parts(), weight.scales.data_ptr()
    else:
        parts, scales = product.parts(), None
    sizes = weight.inputs, weight.outputs, len(weight.words)
    return MatrixParts(parts.prepare, parts.product, parts.grain, weight.words.data_ptr(), scales, *sizes)


def product_room(weight: Weight) -> int:
    """Bytes that the product needs for a row."""
    assert isinstance(weight, Panels | Int8Panels)
    return int8.room(weight) if isinstance(weight, Int8Panels) else product.room(weight)


def _matrices(layer: Layer) -> tuple[Weight, ...]:
    """In the order of ``LayerParts``."""
    return layer.qkv, layer.out, layer.gate_up, layer.down
