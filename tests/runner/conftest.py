from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.model.loading import Target, load_target
from engine.model.packaged import DEFAULT_MODEL


@pytest.fixture(scope="session")
def smollm() -> Target:
    """The real default model in float32; the first use fetches it."""
    home = Path(os.environ.get("SLIPSTREAM_HOME", "~/.local/share/slipstream")).expanduser()
    return load_target(DEFAULT_MODEL, home / "models", progress=print)


@pytest.fixture(scope="session")
def prompt_folder() -> Path:
    """Real prompts beside the repository; they are not part of it."""
    folder = Path(__file__).parents[3] / "shared" / "prompts"
    if not folder.is_dir():
        pytest.skip(f"no prompts at {folder}: put JSONL files in Spec-Bench's shape there to run this test")
    return folder
