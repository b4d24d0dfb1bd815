"""Text to token ids and back: ``tokenizers`` and the model's own chat template, nothing of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

from engine.contracts import SlipstreamError

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_turn|>")
"""Special tokens that end an assistant's turn, whatever a config names as end of text."""

_MARK = "7f3a9c51"
"""A user turn that no template says by itself."""


class Tokenizer:
    def __init__(self, folder: Path) -> None:
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise SlipstreamError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
        self.folder = folder
        self.config = _json(folder / "tokenizer_config.json")

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` with whatever the tokenizer itself adds (Llama's BOS)."""
        return self._ids(text, add_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.backend.decode(ids, skip_special_tokens=True))

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self.backend)

    @property
    def vocab_size(self) -> int:
        return int(self.backend.get_vocab_size())

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant is to speak. A template's refusal is an error."""
        return self._ids(self._rendered(messages, add_generation_prompt=True), add_special_tokens=False)

    def open_user_turn(self) -> list[int]:
        """Token ids up to where the first user is to speak, the template's own system turn included."""
        text = self._rendered([{"role": "user", "content": _MARK}], add_generation_prompt=False)
        opening, found, _ = text.partition(_MARK)
        if not found:
            raise SlipstreamError("The model's chat template does not repeat what the user says as it was said.")
        return self._ids(opening, add_special_tokens=False)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=_content(self.config.get("bos_token")),
                eos_token=_content(self.config.get("eos_token")),
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise SlipstreamError(f"The model's chat template refuses these messages: {error}") from None

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """As a batch of one: ``encode`` stops every other thread meanwhile, for seconds on a text of megabytes."""
        return list(self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a response: of generation_config, config, tokenizer_config, and known ends of turn."""
        ids = set[int]()
        for name in ("generation_config.json", "config.json"):
            found = _json(self.folder / name).get("eos_token_id")
            ids.update([found] if isinstance(found, int) else found or [])
        for token in (_content(self.config.get("eos_token")), *_TURN_ENDS):
            if (known := self.backend.token_to_id(token)) is not None:
                ids.add(known)
        return frozenset(ids)

    @cached_property
    def _template(self) -> Template:
        path = self.folder / "chat_template.jinja"
        source = path.read_text() if path.is_file() else self.config.get("chat_template")
        if isinstance(source, list):  # several named templates
            source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
        if not source:
            raise SlipstreamError(f"{self.folder} has no chat template; use /v1/completions with this model.")
        # As transformers renders it. Sandboxed and immutable: a template is code from a download.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        return environment.from_string(source)


class Detokenizer:
    """Text of one response, token by token; special tokens say nothing."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that became certain with ``token_id``; "" while a character lacks bytes."""
        try:
            text = self._stream.step(self._backend, token_id)
        except Exception:  # tokenizers raises bare Exception
            # A byte that fits nothing makes byte-fallback decoders replace its valid neighbours too, though they are
            # out already: go on after them, with the last token before, since the first of a text loses its space.
            text = self._backend.decode([*self._pending, token_id], skip_special_tokens=True)
            self._stream = DecodeStream(ids=[token_id], skip_special_tokens=True)
        if text is None:
            self._pending.append(token_id)
            return ""
        self._pending.clear()
        return str(text)

    def finish(self) -> str:
        """What is left when the response ends inside a character: its bytes as replacement characters."""
        text = self._backend.decode(self._pending, skip_special_tokens=True) if self._pending else ""
        self._pending.clear()
        return str(text)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise SlipstreamError(f"{path} is not JSON: {error}") from None


def _content(token: Any) -> str:
    """Special tokens stand in configs as text or as {"content": text}."""
    return str(token["content"]) if isinstance(token, dict) else token or ""


def _raise(message: str) -> None:
    raise TemplateError(message)
