"""The static draft that comes with the project: trained offline for the default model, before any traffic.

README says by which command. It fits one target only, by fingerprint; every other model needs one of its own.
"""

from __future__ import annotations

from importlib.resources import files

from engine.speculation.artifact import MANIFEST, read_manifest
from engine.speculation.neural_file import SHAPE_FILE, WEIGHTS_FILE

FOLDER = "static_draft"


def shipped_draft(target_fingerprint: str) -> dict[str, bytes] | None:
    """The files of the neural policy for this target; None where it was made for another."""
    folder = files("engine.learner") / FOLDER
    artifact = {name: (folder / name).read_bytes() for name in (MANIFEST, SHAPE_FILE, WEIGHTS_FILE)}
    return artifact if read_manifest(artifact).target_fingerprint == target_fingerprint else None
