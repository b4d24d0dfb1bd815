"""C sources of this package, compiled at start for this processor.

Without a C compiler there is torch. Threads are those of torch: a second pool of them would fight with the first for
the same cores.
"""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

log = logging.getLogger(__name__)
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-std=gnu11")
COMPILE_S = 60.0
HEADERS = Path(__file__).parent
T = TypeVar("T")


def compile_c(source: Path, constants: Mapping[str, int], load: Callable[[Path], T]) -> T | None:
    """What ``load`` makes of the shared library, which is gone afterwards; None, with the reason in the log."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        log.info("no C compiler: torch runs instead of %s, which is slower", source.name)
        return None
    threads = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))  # torch's own, or none
    parallel = ("-fopenmp", f"-L{threads[0].parent}", f"-l:{threads[0].name}") if threads else ()
    with tempfile.TemporaryDirectory(prefix="slipstream-kernels-") as folder:
        library = Path(folder) / "kernels.so"
        defines = [f"-D{name}={value}" for name, value in constants.items()]
        command = [compiler, *FLAGS, f"-I{HEADERS}", *defines, str(source), "-o", str(library), *parallel]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_S)
            return load(library)
        except (OSError, subprocess.SubprocessError, AttributeError) as error:
            reason = getattr(error, "stderr", None) or error
            log.warning("%s cannot be compiled, torch runs instead: %s", source.name, reason)
            return None


def compile_function(
    source: Path, name: str, constants: Mapping[str, int], *arguments: type
) -> Callable[..., None] | None:
    """The function ``name`` of a source, which the interpreter is left for; None as of ``compile_c``."""
    return compile_c(source, constants, lambda library: function(ctypes.CDLL(str(library))[name], *arguments))


def function(found: Any, *arguments: type) -> Callable[..., None]:
    """A function of a library with the types of its arguments; it returns nothing."""
    found.argtypes, found.restype = arguments, None
    return cast(Callable[..., None], found)


@dataclass(frozen=True, slots=True)
class Parts:
    """Addresses of a product's functions, for other C to call; ``prepare`` None: it has none."""

    prepare: int | None
    product: int
    grain: int


@dataclass(frozen=True, slots=True)
class CompiledProduct:
    """``multiply(x, room, weights, scales, out, rows, inputs, outputs)`` with all threads of torch."""

    multiply: Callable[..., None]
    parts: Parts


def compile_product(source: Path, constants: Mapping[str, int]) -> CompiledProduct | None:
    """Of ``product.c`` and its like; None as of ``compile_c``."""

    def load(path: Path) -> CompiledProduct:
        library = ctypes.CDLL(str(path))
        prepare = _address(library.prepare) if hasattr(library, "prepare") else None
        multiply = function(library.multiply, *[POINTER] * 5, *[COUNT] * 3)
        return CompiledProduct(multiply, Parts(prepare, _address(library.product), _address(library.grain)))

    return compile_c(source, constants, load)


def _address(found: Any) -> int:
    return cast(int, ctypes.cast(found, ctypes.c_void_p).value)


POINTER, COUNT = ctypes.c_void_p, ctypes.c_int64
