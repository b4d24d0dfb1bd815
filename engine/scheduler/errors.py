"""Why a request was not queued."""

from __future__ import annotations

from engine.contracts import SlipstreamError


class QueueFull(SlipstreamError):
    """Too many requests wait already; try again later (HTTP 429)."""


class RequestTooLong(SlipstreamError):
    """Prompt and output together can never fit (HTTP 400)."""
