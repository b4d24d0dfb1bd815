"""Server-sent events that end when their client does."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send


class EventStream(StreamingResponse):
    """Sends what ``events`` yields, and closes it when the response is over, however that came.

    A client that stops reading and then goes away leaves the generator at a yield. Left to the garbage collector it
    would end some time later, and until then the engine would decode for nobody.
    """

    def __init__(self, events: AsyncGenerator[str, None], headers: Mapping[str, str]) -> None:
        # Proxies must not hold tokens back until there are enough of them.
        unbuffered = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers={**headers, **unbuffered})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
