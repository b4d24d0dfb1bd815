"""What a run keeps is there for the next one, also after a kill in the middle of a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.bench.kept import kept_lines
from engine.contracts import SlipstreamError


def test_half_a_line_is_forgotten_and_what_comes_next_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    assert kept_lines(path) == []
    whole = "".join(json.dumps([n, "é"], ensure_ascii=False) + "\n" for n in range(3)).encode()
    for cut in range(1, 8):
        path.write_bytes(whole + whole[:8][:cut].replace(b"\n", b""))
        assert kept_lines(path) == [[n, "é"] for n in range(3)]
        with path.open("a") as file:
            file.write("[3]\n")
        assert kept_lines(path)[-1] == [3]
    path.write_bytes(b"[0, ")
    assert kept_lines(path) == []


def test_a_line_that_was_spoiled_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    path.write_text("[1]\n[2, [3]\n[4]\n")
    with pytest.raises(SlipstreamError, match=r"Line 2 of .*kept\.jsonl.*Remove the file"):
        kept_lines(path)
