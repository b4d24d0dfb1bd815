"""A policy artifact: a handful of files, addressed by the sha256 over them (``contracts.artifact_digest``).

``manifest.json`` says what the policy is; what else there is belongs to its kind. Loading is strict: whatever is not
known, does not fit the target, or is not what the digest promises, is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from engine.contracts import ProposerKind, SlipstreamError, artifact_digest
from engine.speculation.acceptance import ControlSettings
from engine.speculation.proposer import PolicyError, Proposer, loaders

MANIFEST = "manifest.json"
FORMAT = 2
"""2: with ``control``. Format 1 is still read: its policies have the default K control."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """``target_fingerprint`` is None where a policy holds no tokens and so fits any target.

    ``control`` are the settings of its K controller (``control.ControlSettings``); what is not named is the default.
    ``lineage`` is for readers, not for loading: training window, trace ids, code revision, metrics of the gate.
    """

    kind: ProposerKind
    num_speculative_tokens: int
    settings: dict[str, Any] = field(default_factory=dict)
    control: dict[str, Any] = field(default_factory=dict)
    target_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    parent: str | None = None
    lineage: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


def build_artifact(
    kind: ProposerKind,
    num_speculative_tokens: int,
    *,
    settings: Mapping[str, Any] | None = None,
    control: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    target_fingerprint: str | None = None,
    tokenizer_fingerprint: str | None = None,
    parent: str | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """The files of a policy, checked by loading them once. The same arguments give the same bytes."""
    manifest = Manifest(
        ProposerKind(kind),
        num_speculative_tokens,
        dict(settings or {}),
        dict(control or {}),
        target_fingerprint,
        tokenizer_fingerprint,
        parent,
        dict(lineage or {}),
    )
    text = json.dumps(asdict(manifest), indent=1, sort_keys=True, ensure_ascii=False)
    artifact = {MANIFEST: text.encode(), **(files or {})}
    load_proposer(artifact, artifact_digest(artifact), target_fingerprint, tokenizer_fingerprint)
    return artifact


def load_proposer(
    artifact: Mapping[str, bytes] | Path,
    expected_digest: str,
    target_fingerprint: str | None,
    tokenizer_fingerprint: str | None = None,
) -> Proposer:
    """The resident policy that an artifact describes, or a PolicyError that says what is wrong with it."""
    files = read_artifact(artifact) if isinstance(artifact, Path) else dict(artifact)
    if (digest := artifact_digest(files)) != expected_digest:
        raise PolicyError(f"The policy artifact has digest {digest[:12]}…, but {expected_digest[:12]}… was promised.")
    manifest = read_manifest(files)
    _check_fingerprint("target", manifest.target_fingerprint, target_fingerprint)
    _check_fingerprint("tokenizer", manifest.tokenizer_fingerprint, tokenizer_fingerprint)
    if manifest.kind in _OF_ONE_TARGET and manifest.target_fingerprint is None:
        raise PolicyError(f"A {manifest.kind} policy fits one target, so its manifest must name a target_fingerprint.")
    del files[MANIFEST]
    proposer = loaders()[manifest.kind](manifest.num_speculative_tokens, manifest.settings, files)
    return cast(Proposer, replace(cast(Any, proposer), control=read_control(manifest)))


def read_control(manifest: Manifest) -> ControlSettings:
    """The K controller that a manifest asks for; a PolicyError where it names what there is not."""
    try:
        return ControlSettings.read(manifest.control)
    except SlipstreamError as error:
        raise PolicyError(f"{MANIFEST}: {error}") from None


def read_artifact(folder: Path) -> dict[str, bytes]:
    """The files of an artifact that lies in ``folder``; a subfolder there is an error."""
    if not folder.is_dir():
        raise PolicyError(f"No policy artifact at {folder}: not a folder.")
    if strays := [path.name for path in folder.iterdir() if not path.is_file()]:
        raise PolicyError(f"{folder} is not a policy artifact: {sorted(strays)} are not files.")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_manifest(files: Mapping[str, bytes]) -> Manifest:
    try:
        tree = json.loads(files[MANIFEST])
    except KeyError:
        raise PolicyError(f"A policy artifact needs a {MANIFEST}, got {sorted(files)}.") from None
    except ValueError as error:
        raise PolicyError(f"{MANIFEST} is not JSON: {error}") from None
    if isinstance(tree, dict) and tree.get("format") == 1:
        tree = {"control": {}, **tree, "format": FORMAT}
    known = {f.name for f in fields(Manifest)}
    if not isinstance(tree, dict) or set(tree) != known:
        got = sorted(set(tree) ^ known) if isinstance(tree, dict) else type(tree).__name__
        raise PolicyError(f"{MANIFEST} must have exactly the keys {sorted(known)}; differs in {got}.")
    if tree["format"] != FORMAT:
        raise PolicyError(f"{MANIFEST} has format {tree['format']!r}; this version reads format {FORMAT}.")
    for key, kinds in _TYPES.items():
        if not isinstance(tree[key], kinds) or isinstance(tree[key], bool):
            raise PolicyError(f"{MANIFEST}: {key} has the wrong type, got {tree[key]!r}.")
    try:
        tree["kind"] = ProposerKind(tree["kind"])
    except ValueError:
        raise PolicyError(f"{MANIFEST}: unknown kind {tree['kind']!r}; known: {[*map(str, ProposerKind)]}.") from None
    manifest = Manifest(**tree)
    least = 0 if manifest.kind is ProposerKind.NONE else 1
    if not least <= manifest.num_speculative_tokens <= MAX_K:
        raise PolicyError(
            f"{MANIFEST}: num_speculative_tokens of a {manifest.kind} policy must be {least}–{MAX_K}, "
            f"got {manifest.num_speculative_tokens}."
        )
    return manifest


MAX_K = 32
_OF_ONE_TARGET = (ProposerKind.TRACE_MEMORY, ProposerKind.NEURAL, ProposerKind.HYBRID)
_TYPES: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "num_speculative_tokens": (int,),
    "settings": (dict,),
    "control": (dict,),
    "target_fingerprint": (str, type(None)),
    "tokenizer_fingerprint": (str, type(None)),
    "parent": (str, type(None)),
    "lineage": (dict,),
}


def _check_fingerprint(of: str, wanted: str | None, found: str | None) -> None:
    if wanted is not None and found is not None and wanted != found:
        raise PolicyError(
            f"The policy was made for {of} {wanted[:12]}…, but this engine has {found[:12]}…. Train one for this {of}."
        )
    if of == "target" and wanted is not None and found is None:
        raise PolicyError(f"The policy was made for target {wanted[:12]}…, and no target to compare was given.")
