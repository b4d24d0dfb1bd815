from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from engine.contracts import SlipstreamError
from engine.model.tokenizer import Detokenizer, Tokenizer
from tests.tiny_model import write_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path)
    return tmp_path


def configure(folder: Path, **changes: object) -> Tokenizer:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return Tokenizer(folder)


USER = [{"role": "user", "content": "the thing"}]


def test_encode_and_decode_are_inverse(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    for text in ("the thing on a ring", "naïve — 日本語 🚲\n\ttabs", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    want = "<|im_start|>user\nthe thing<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(USER) == tokenizer.encode(want)


def test_a_template_file_and_named_templates(folder: Path) -> None:
    assert configure(folder, chat_template=[{"name": "default", "template": "ab"}]).apply_chat_template(USER)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages | length }}")
    tokenizer = Tokenizer(folder)
    assert tokenizer.apply_chat_template(USER) == tokenizer.encode("<|im_start|>1")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        (None, "no chat template"),
    ],
)
def test_what_a_template_must_not_or_will_not_do(folder: Path, template: str | None, message: str) -> None:
    with pytest.raises(SlipstreamError, match=message):
        configure(folder, chat_template=template).apply_chat_template(USER)


def test_eos_ids_come_from_every_config(folder: Path) -> None:
    assert Tokenizer(folder).eos_ids == {2}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    assert Tokenizer(folder).eos_ids == {0, 2, 5}


def test_detokenizing_token_by_token_never_splits_a_character(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    text = "the ring — 日本 🚲!"
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert detokenizer.finish() == ""


def test_special_tokens_are_silent_and_an_unfinished_character_shows_at_the_end(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    detokenizer = tokenizer.detokenizer()
    *most, _ = tokenizer.encode("<|im_start|>a🚲")
    assert "".join(detokenizer.push(token) for token in most) == "a"
    assert detokenizer.finish() == "\ufffd"


def test_a_stray_byte_after_a_valid_one_does_not_end_a_response() -> None:
    words = ["<unk>", "\u2581a", "x", "\u2581the", "<0x0A>", "<0xFF>"]
    backend = Backend(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    detokenizer = Detokenizer(backend)
    assert [detokenizer.push(i) for i in (1, 4, 5, 2, 3, 3)] == ["a", "\n", "", "\ufffdx", " the", " the"]
    assert [detokenizer.push(5), detokenizer.finish()] == ["", "\ufffd"]


def test_a_broken_tokenizer_file_says_which(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(SlipstreamError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(folder)
