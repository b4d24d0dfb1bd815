from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.contracts import ProposerKind, artifact_digest
from engine.speculation.acceptance import ControlSettings
from engine.speculation.artifact import MANIFEST, build_artifact, load_proposer, read_manifest
from engine.speculation.memory import MEMORY_FILE
from engine.speculation.proposer import PolicyError, loaders
from tests.trace_memory import TraceMemoryBuilder


def memory_artifact(**changes: object) -> dict[str, bytes]:
    builder = TraceMemoryBuilder()
    builder.add("chat", [1, 2], [3, 4, 5])
    options: dict = {"files": {MEMORY_FILE: builder.build(10_000)}, "target_fingerprint": "t" * 64, "parent": "p" * 64}
    return build_artifact(ProposerKind.TRACE_MEMORY, 4, **(options | changes))


def rewritten(files: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    manifest = json.loads(files[MANIFEST]) | changes
    return {**files, MANIFEST: json.dumps({k: v for k, v in manifest.items() if v != "gone"}).encode()}


def test_every_kind_has_a_loader() -> None:
    assert loaders().keys() == set(ProposerKind)


def test_round_trip_through_a_folder(tmp_path: Path) -> None:
    files = memory_artifact(lineage={"requests": 64})
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    proposer = load_proposer(tmp_path, artifact_digest(files), "t" * 64)
    assert (proposer.kind, proposer.num_speculative_tokens) == (ProposerKind.TRACE_MEMORY, 4)
    assert proposer.start([1, 2], "chat").propose(1) == [3]
    assert read_manifest(files).parent == "p" * 64
    assert read_manifest(files).lineage == {"requests": 64}


def test_same_arguments_same_digest_and_any_byte_changes_it() -> None:
    files = memory_artifact()
    assert artifact_digest(files) == artifact_digest(memory_artifact())
    assert artifact_digest({**files, MEMORY_FILE: files[MEMORY_FILE] + b"\0"}) != artifact_digest(files)
    assert artifact_digest({"a": b"b"}) != artifact_digest({"ab": b""})


def test_policies_without_tokens_fit_any_target() -> None:
    for kind, k in ((ProposerKind.NONE, 0), (ProposerKind.NGRAM, 4)):
        files = build_artifact(kind, k)
        assert load_proposer(files, artifact_digest(files), "any").kind is kind


def test_wrong_digest_target_or_tokenizer_is_refused() -> None:
    files = memory_artifact(tokenizer_fingerprint="k" * 64)
    digest = artifact_digest(files)
    with pytest.raises(PolicyError, match="promised"):
        load_proposer(files, "0" * 64, "t" * 64)
    with pytest.raises(PolicyError, match="made for target"):
        load_proposer(files, digest, "u" * 64)
    with pytest.raises(PolicyError, match="made for target"):
        load_proposer(files, digest, None)
    with pytest.raises(PolicyError, match="made for tokenizer"):
        load_proposer(files, digest, "t" * 64, "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"lineage": "gone"}, "lineage"),
        ({"kind": "oracle"}, "unknown kind"),
        ({"format": 3}, "format"),
        ({"num_speculative_tokens": 0}, "must be 1"),
        ({"num_speculative_tokens": True}, "wrong type"),
        ({"control": {"k": 3}}, "no setting 'k'"),
        ({"control": {"min_gain": -1.0}}, "min_gain"),
        ({"settings": {"temperature": 1}}, "no setting 'temperature'"),
        ({"settings": {"min_confidence": "high"}}, "must be a number"),
        ({"target_fingerprint": None}, "must name a target"),
    ],
)
def test_strict_manifest(changes: dict[str, object], message: str) -> None:
    files = rewritten(memory_artifact(), **changes)
    with pytest.raises(PolicyError, match=message):
        load_proposer(files, artifact_digest(files), "t" * 64)


def test_control_settings_are_part_of_the_policy() -> None:
    files = memory_artifact(control={"enabled": False, "min_gain": 0.1})
    assert artifact_digest(files) != artifact_digest(memory_artifact())
    control = load_proposer(files, artifact_digest(files), "t" * 64).control
    assert (control.enabled, control.min_gain, control.probe_every) == (False, 0.1, ControlSettings().probe_every)


def test_format_1_had_no_control() -> None:
    files = rewritten(memory_artifact(), format=1, control="gone")
    assert load_proposer(files, artifact_digest(files), "t" * 64).control == ControlSettings()


def test_missing_broken_and_stray_files(tmp_path: Path) -> None:
    for files, message in (({}, "needs a"), ({MANIFEST: b"{"}, "not JSON"), ({MANIFEST: b"[]"}, "exactly the keys")):
        with pytest.raises(PolicyError, match=message):
            load_proposer(files, artifact_digest(files), None)
    with pytest.raises(PolicyError, match="not a folder"):
        load_proposer(tmp_path / "nowhere", "", None)
    (tmp_path / "sub").mkdir()
    with pytest.raises(PolicyError, match="not files"):
        load_proposer(tmp_path, "", None)
    with pytest.raises(PolicyError, match="no files"):
        build_artifact(ProposerKind.NGRAM, 4, files={"extra.bin": b""})
