"""What the two completion routes accept. Strict: a field that is not known, or known and not supported, is an error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from engine.contracts import SamplingParams
from engine.server.errors import ApiError, invalid

MAX_STOPS = 4
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
}
"""Fields of OpenAI's API that are accepted only where they change nothing."""


def _whole_characters(text: str) -> str:
    """JSON can hold half an emoji (a client that cuts UTF-16 in the middle sends one); no tokenizer can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair at character {error.start}, which is no text") from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Text | list[Text] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    ignore_eos: bool = False

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    def sampling(self, max_tokens: int) -> SamplingParams:
        stops: Sequence[str] = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or not all(stops):
            raise invalid(f"stop takes at most {MAX_STOPS} strings, none of them empty.", "stop")
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=tuple(stops),
            ignore_eos=self.ignore_eos,
        )


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Role and text as a chat template takes them; "developer" is OpenAI's newer name for "system"."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(_Request):
    prompt: Text | list[int] | list[Text]


T = TypeVar("T", bound=_Request)


def parse(kind: type[T], body: bytes) -> T:
    """The request in ``body``, or the ApiError that says what is wrong with it."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise invalid(f"The body is not valid JSON: {error}.") from None
    if not isinstance(tree, dict):
        raise invalid(f"The body must be a JSON object, not {type(tree).__name__}.")
    tree = _given(tree)
    if isinstance(messages := tree.get("messages"), list):  # a client sends an answer back with its ``refusal: null``
        tree["messages"] = [_given(message) if isinstance(message, dict) else message for message in messages]
    for name, harmless in NEUTRAL.items():
        if name in tree and tree.pop(name) not in harmless:
            raise invalid(f"{name} is not supported here; leave it out.", name, "unsupported_parameter")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _from_pydantic(error) from None


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's null means: not given."""
    return {name: value for name, value in fields.items() if value is not None}


def _from_pydantic(error: ValidationError) -> ApiError:
    """One complaint, in OpenAI's words where it has some: where a field may be of several types, about the nearest."""
    first = max(error.errors(), key=lambda complaint: len(complaint["loc"]))
    param = ".".join(str(part) for part in first["loc"] if not _is_branch(part)) or None
    if first["type"] == "extra_forbidden":
        return invalid(f"Unrecognized request argument supplied: {param}", param)
    if first["type"] == "missing":
        return invalid(f"You must provide a {param} parameter.", param)
    return invalid(f"{param}: {first['msg']} (got {_short(first['input'])}).", param)


def _is_branch(part: int | str) -> bool:
    """Whether this part of a location only says which type of a union was tried: no field of ours looks like it."""
    return isinstance(part, str) and (part in ("str", "list") or "[" in part)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
