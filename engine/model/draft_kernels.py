"""A whole neural draft in one call of C, for bfloat16 on a CPU: compiled for the draft's shape (draft.c).

A pass of it is so short that what torch does between its operators takes longer than they do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from engine.model.batch import Batch, Row, build_batch
from engine.model.compiler import COUNT, POINTER, compile_c, function
from engine.model.draft import NUM_AUX, DraftNetwork
from engine.model.kernels import LANES, LayerParts, MatrixParts, Shape, matrix_parts, product_room, shape_of
from engine.model.kv_cache import KVCache
from engine.model.llama import Llama
from engine.model.product import Panels

SOURCE = Path(__file__).with_name("draft.c")


class _Draft(ctypes.Structure):
    _fields_ = (
        ("shape", Shape), ("embedding", POINTER), ("embedding_norm", POINTER), ("norm", POINTER),
        ("vocabulary", POINTER), ("fuse", MatrixParts), ("layer", LayerParts), ("head", MatrixParts),
    )  # fmt: skip


def compile_draft(network: DraftNetwork) -> DraftKernels | None:
    """Kernels for a draft whose target has its own; None where torch must run it."""
    config = network.config
    held = all(isinstance(matrix, Panels) for matrix in (*network.matrices.values(), network.packed_head))
    if network.target.kernels is None or not held or config.intermediate_size % LANES:
        return None
    found = _compiled(SOURCE, config.head_dim, config.num_heads // config.num_kv_heads)
    return None if found is None else DraftKernels(found, network)


def compile_for(target: Llama) -> None:
    """What drafts in the target's own shape will need, before a request waits for it."""
    if target.kernels is not None:
        _compiled(SOURCE, target.config.head_dim, target.config.group_size)


@dataclass(frozen=True, slots=True)
class _Functions:
    draft: Callable[..., None]
    remember: Callable[..., None]


@cache
def _compiled(source: Path, head_dim: int, group: int) -> _Functions | None:
    """Once for all drafts of a shape: new ones come every few minutes."""

    def load(path: Path) -> _Functions:
        library = ctypes.CDLL(str(path))
        slots = [*[POINTER] * 5, COUNT]
        drafting = [*slots, *[POINTER] * 2, COUNT, ctypes.c_double, *[POINTER] * 5, COUNT, *[POINTER] * 3]
        return _Functions(function(library.draft, *drafting), function(library.remember, *slots, *[POINTER] * 4))

    return compile_c(source, {"HEAD_DIM": head_dim, "GROUP": group, "NUM_AUX": NUM_AUX}, load)


class DraftKernels:
    def __init__(self, functions: _Functions, network: DraftNetwork) -> None:
        """Its weights, and so ``network``, must stay where they are."""
        self._functions = functions
        config, target = network.config, network.target
        weights, matrices = network.weights, network.matrices
        parts = [matrices[name] for name in ("qkv", "out", "gate_up", "down")]
        layer = LayerParts(
            weights["hidden_norm"].data_ptr(), weights["mlp_norm"].data_ptr(), None, None, *map(matrix_parts, parts)
        )
        self._draft = _Draft(
            shape_of(target, config.num_kv_heads), target.embedding.data_ptr(), weights["embedding_norm"].data_ptr(),
            weights["norm"].data_ptr(), network.vocabulary.data_ptr(), matrix_parts(matrices["fuse"]), layer,
            matrix_parts(network.packed_head),
        )  # fmt: skip
        heads = config.num_heads * config.head_dim
        qkv = heads + 2 * config.num_kv_heads * config.head_dim
        self._per_slot = 5 * config.hidden_size + max(qkv + heads, 3 * config.intermediate_size)
        self._per_row = config.hidden_size + config.vocab_size
        self._product_room = max(map(product_room, [*matrices.values(), network.packed_head]))

    def draft(
        self, rows: Sequence[Row], wanted: Sequence[int], aux: Tensor, cache: KVCache, min_survival: float
    ) -> list[tuple[list[int], list[float]]]:
        """(tokens, chances) for each of ``rows``, the slots of a request that wait, at least one; ``aux``
        [all their tokens, 3 * hidden], what the target's layers gave out there, is written over. Of each at most so
        many tokens as are ``wanted``, up to the one with which it is less likely than ``min_survival`` that all are
        accepted."""
        n, count, most = aux.shape[0], len(rows), max(wanted)
        slots = self._slots(rows, aux, cache)
        asked = torch.tensor([list(accumulate(len(row.token_ids) for row in rows)), list(wanted)])
        room = aux.new_empty(n * self._per_slot + count * self._per_row)
        multiplying = torch.empty(n * self._product_room, dtype=torch.uint8)
        starts = torch.empty(n + 1, dtype=torch.int64)
        drafted = torch.empty(count, most, dtype=torch.int64)
        chances = torch.empty(count, most, dtype=torch.float64)
        counts = torch.empty(count, dtype=torch.int64)
        self._functions.draft(
            ctypes.byref(self._draft), slots.token_ids.data_ptr(), slots.positions.data_ptr(), slots.places.data_ptr(),
            aux.data_ptr(), n,
            *(row.data_ptr() for row in asked), count, min_survival, cache.flat_keys[0].data_ptr(),
            cache.flat_values[0].data_ptr(), room.data_ptr(), starts.data_ptr(), multiplying.data_ptr(), most,
            drafted.data_ptr(), chances.data_ptr(), counts.data_ptr(),
        )  # fmt: skip
        made = zip(drafted.tolist(), chances.tolist(), counts.tolist(), strict=True)
        return [(tokens[:k], likely[:k]) for tokens, likely, k in made]

    def remember(self, rows: Sequence[Row], aux: Tensor, cache: KVCache) -> None:
        """Keys and values of slots whose predictions nobody wants; ``rows`` and ``aux`` as of ``draft``."""
        n, slots = aux.shape[0], self._slots(rows, aux, cache)
        room, multiplying = aux.new_empty(n * self._per_slot), torch.empty(n * self._product_room, dtype=torch.uint8)
        self._functions.remember(
            ctypes.byref(self._draft), slots.token_ids.data_ptr(), slots.positions.data_ptr(), slots.places.data_ptr(),
            aux.data_ptr(), n,
            cache.flat_keys[0].data_ptr(), cache.flat_values[0].data_ptr(), room.data_ptr(), multiplying.data_ptr(),
        )  # fmt: skip

    def _slots(self, rows: Sequence[Row], aux: Tensor, cache: KVCache) -> Batch:
        """The slots that C is given: it reads and writes by what is checked here."""
        batch = build_batch(rows, [], cache.max_len, 1, aux.dtype, aux.device, grouped=False)
        assert batch.token_ids.shape[0] == aux.shape[0]
        assert aux.is_contiguous()
        assert aux.dtype == torch.bfloat16
        return batch
