"""Who asks, for which class of traffic, and is it a retry: read from headers and the request, never from the model."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from engine.server.errors import invalid

CLASS_NAME = re.compile(r"[a-z0-9_]{1,32}")
RESERVED = frozenset({"all", "unknown"})
"""Names that guards and charts use for totals and for what has no class."""
LONGEST = 256
MOST_RETRIES = 100
LONG_PROMPT_TOKENS = 512
LONG_OUTPUT_TOKENS = 512
CODE = re.compile(
    r"```|\bdef \w+\(|\bclass \w+[:(]|#include\b|\bfunction \w*\(|\bSELECT\b.+\bFROM\b|python|javascript", re.I
)


@dataclass(frozen=True, slots=True)
class Caller:
    """``key`` decides the arm, among the requests that a plan's slice takes. ``retry`` counts the attempts before this
    one. ``payload`` False keeps no token ids."""

    request_id: str
    key: str
    tenant: str | None
    traffic_class: str | None
    retry: int
    trainable: bool
    payload: bool
    slice_name: str | None = None


def read_caller(
    headers: Mapping[str, str], metadata: Mapping[str, str] | None, user: str | None, request_id: str
) -> Caller:
    """The assignment key is the conversation, else the user, else the request itself.

    A retry is what the client says it is: the OpenAI SDKs send ``x-stainless-retry-count``. ``retry`` is that count;
    whoever remembers idempotency keys (``Repeats``) may know of more.
    """
    extra = metadata or {}
    conversation = headers.get("x-conversation-id") or extra.get("conversation_id")
    traffic_class = headers.get("x-traffic-class") or extra.get("traffic_class")
    if traffic_class is not None and (not CLASS_NAME.fullmatch(traffic_class) or traffic_class in RESERVED):
        raise invalid(
            f"X-Traffic-Class {traffic_class[:40]!r} is not a class name: 1 to 32 of a–z, 0–9 and _, and not one of "
            f"{', '.join(sorted(RESERVED))}.",
            "traffic_class",
        )
    retries = headers.get("x-stainless-retry-count", "0")
    return Caller(
        request_id=request_id,
        key=clean(conversation or user or request_id),
        tenant=clean(headers["x-tenant"]) if "x-tenant" in headers else None,
        traffic_class=traffic_class,
        retry=min(int(retries[:4]), MOST_RETRIES) if retries.isdecimal() else 0,
        trainable=not _flag(headers.get("x-no-train")),
        payload=not _flag(headers.get("x-no-payload")),
        slice_name=clean(headers["x-slice"]) if "x-slice" in headers else None,
    )


class Repeats:
    """Remembers the last ``size`` idempotency keys of this replica: a key that comes again is a retry.

    Only counted: the request is served like any other, since an answer is not kept.
    """

    def __init__(self, size: int = 10_000) -> None:
        self._size = size
        self._seen: OrderedDict[tuple[str | None, str], int] = OrderedDict()

    def count(self, tenant: str | None, key: str) -> int:
        """How often ``key`` came before, from this tenant; and remember that it came now."""
        before = self._seen.pop((tenant, key), 0)
        self._seen[(tenant, key)] = before + 1  # the newest is last
        if len(self._seen) > self._size:
            self._seen.popitem(last=False)
        return min(before, MOST_RETRIES)


def classify(text: str, prompt_tokens: int, max_tokens: int) -> str:
    """The class of a request that names none: a long prompt or answer is long_form, what looks like code is code,
    all else is chat. ``batch`` is never guessed: only its sender knows that nobody waits."""
    if prompt_tokens > LONG_PROMPT_TOKENS or max_tokens > LONG_OUTPUT_TOKENS:
        return "long_form"
    return "code" if CODE.search(text) else "chat"


def clean(text: str) -> str:
    """Client text as Postgres can store it: no NUL, no lone surrogate, no more than ``LONGEST`` characters."""
    return text[:LONGEST].replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


def _flag(value: str | None) -> bool:
    return value is not None and value.strip().lower() not in ("", "0", "false", "no")
