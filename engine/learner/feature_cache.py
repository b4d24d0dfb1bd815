"""Features of many conversations on disk, so that every epoch but the first costs no prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.learner.features import KEPT, Example, example
from engine.model.llama import Llama

PER_FILE = 16


@dataclass(frozen=True, slots=True)
class Conversation:
    """Token ids of one prompt, in the target's chat template, and of what the target answered."""

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    traffic_class: str


def cached_examples(
    folder: Path,
    model: Llama,
    conversations: Sequence[Conversation],
    aux_layers: Sequence[int],
    due: Callable[[int, int], bool],
) -> list[Example] | None:
    """One example per conversation, from ``folder`` where it is there; files appear whole or not at all.

    ``due(done, all)`` is asked after every file and may end the work by saying True: then None, and the next call goes
    on. ``folder`` must belong to this target and these conversations: name it by a digest of both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = list[Example]()
    for first in range(0, len(conversations), PER_FILE):
        path = folder / f"{first:06d}.safetensors"
        if not path.exists():
            some = conversations[first : first + PER_FILE]
            _write(path, [example(model, c.prompt_ids, c.output_ids, aux_layers, KEPT) for c in some])
            if due(first + len(some), len(conversations)):
                return None
        found += _read(path)
    return found


def _write(path: Path, examples: Sequence[Example]) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for i, e in enumerate(examples):
        tensors |= {f"{i}/token_ids": e.token_ids, f"{i}/aux": e.aux, f"{i}/said": e.said, f"{i}/log_z": e.log_z}
    fresh = path.with_suffix(".new")
    save_file(tensors, fresh)
    fresh.replace(path)


def _read(path: Path) -> list[Example]:
    from safetensors.torch import load_file

    tensors, found = load_file(path), list[Example]()
    while f"{len(found)}/aux" in tensors:
        ids, aux, said, log_z = (tensors[f"{len(found)}/{n}"] for n in ("token_ids", "aux", "said", "log_z"))
        found.append(Example(ids, len(ids) - 2 - len(said), aux, said, log_z))
    return found
