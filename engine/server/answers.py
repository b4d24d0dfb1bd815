"""Answers in OpenAI's shapes, whole and as chunks. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from engine.contracts import FinishReason


@dataclass(frozen=True, slots=True)
class Shape:
    """One answer's identity; ``chat`` chooses between the two routes' shapes. ``created`` is Unix seconds."""

    id: str
    created: int
    model: str
    chat: bool

    def whole(self, text: str, reason: FinishReason, usage: dict[str, int]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason.value, "logprobs": None}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": [choice], "usage": usage}

    def role(self) -> str:
        """The first chunk of a chat stream: who speaks."""
        return self._chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def piece(self, text: str) -> str:
        return self._chunk([self._choice(text, None)])

    def end(self, reason: FinishReason) -> str:
        return self._chunk([self._choice("", reason)])

    def usage(self, usage: dict[str, int]) -> str:
        """The chunk that ``stream_options.include_usage`` asks for: no choices."""
        return self._chunk([], usage)

    def _choice(self, text: str, reason: FinishReason | None) -> dict[str, Any]:
        said = reason.value if reason is not None else None
        if self.chat:
            return {"index": 0, "delta": {"content": text} if reason is None else {}, "finish_reason": said}
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": said}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return event(head | {"choices": choices} | ({"usage": usage} if usage is not None else {}))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


DONE = "data: [DONE]\n\n"


def event(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def token_usage(prompt_tokens: int, output_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }
