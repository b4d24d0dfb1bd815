"""The OpenAI-compatible HTTP API."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from uuid import uuid4

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from engine.contracts import FinishReason, SlipstreamError
from engine.runner.engine import Output
from engine.server.answers import DONE, Shape, event, token_usage
from engine.server.caller import Caller, Repeats, classify, clean, read_caller
from engine.server.errors import ApiError, internal, invalid
from engine.server.schemas import ChatRequest, CompletionRequest, parse
from engine.server.service import Running, Service
from engine.server.streaming import EventStream

log = logging.getLogger(__name__)
CLIENT_CLOSED = 499
"""nginx's status for a client that went away; nobody reads it but the log."""

MOST_FORGOTTEN = 32
"""A body this many times larger than allowed is no mistake any more; its sender is cut off."""
LARGE_BODY = 32_768
"""Bytes from which a prompt is tokenised beside the event loop: a megabyte takes long enough for others to notice."""


class Api:
    """The routes over a service.

    ``not_ready`` says why the server cannot serve yet, ``incomplete`` what of the plan it serves without; or None.
    """

    def __init__(
        self,
        service: Service,
        max_body_bytes: int,
        not_ready: Callable[[], str | None],
        incomplete: Callable[[], str | None],
    ) -> None:
        self.service, self._max_body_bytes = service, max_body_bytes
        self._not_ready, self._incomplete = not_ready, incomplete
        self.repeats = Repeats()
        self._created = int(service.now().timestamp())

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{model:path}", self.model),
                Route("/healthz", self.healthz),
                Route("/readyz", self.readyz),
                Route("/metrics", self.metrics),
            ],
            exception_handlers={HTTPException: _http_error, ApiError: _api_error, Exception: _unexpected},
        )

    async def chat(self, request: Request) -> Response:
        return await _Call(self, request, ChatRequest).answer()

    async def completions(self, request: Request) -> Response:
        return await _Call(self, request, CompletionRequest).answer()

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self.check_model(request.path_params["model"])
        return JSONResponse(self._model())

    async def healthz(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(self, _: Request) -> Response:
        if (reason := self._not_ready()) is not None:
            return PlainTextResponse(f"not ready: {reason}\n", 503)
        missing = self._incomplete()
        return PlainTextResponse("ready\n" if missing is None else f"ready, but without {missing}\n")

    async def metrics(self, _: Request) -> Response:
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4")

    def check_model(self, name: str) -> None:
        if name != self.service.target.name:
            raise ApiError(
                404,
                f"The model {name[:100]!r} does not exist here; {self.service.target.name!r} does.",
                param="model",
                code="model_not_found",
            )

    async def read_body(self, request: Request) -> bytes:
        """The body, kept only while it is within its limit.

        The rest of a larger one is read and forgotten, so that the client gets to read its 413: a server that closes
        while it is still being written to resets the connection, answer and all.
        """
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= self._max_body_bytes:
                chunks.append(chunk)
            elif size > MOST_FORGOTTEN * self._max_body_bytes:
                break
        if size > self._max_body_bytes:
            raise ApiError(
                413,
                f"The body is larger than {self._max_body_bytes} bytes.",
                code="request_too_large",
                headers={"connection": "close"},
            )
        return b"".join(chunks)

    def _model(self) -> dict[str, object]:
        return {"id": self.service.target.name, "object": "model", "created": self._created, "owned_by": "slipstream"}


class _Call:
    """One completion request on its way through."""

    def __init__(self, api: Api, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> None:
        self.api, self.service, self.request, self.kind = api, api.service, request, kind
        self.arrived, self.started_at = self.service.clock(), self.service.now()
        self.request_id = clean(request.headers.get("x-request-id") or f"req-{uuid4().hex}")
        self.caller: Caller | None = None

    async def answer(self) -> Response:
        try:
            running, shape, body = await self._start()
        except ApiError as error:
            return self._refusal(error)
        except ClientDisconnect:
            return self._refusal(ApiError(CLIENT_CLOSED, "The client went away while it sent its request."))
        except Exception:
            log.exception("request %s failed before it reached the engine", self.request_id)
            return self._refusal(internal(self.request_id))
        if body.stream:
            return await self._stream(running, shape, body.include_usage)
        return await self._whole(running, shape)

    async def _start(self) -> tuple[Running, Shape, ChatRequest | CompletionRequest]:
        service = self.service
        data = await self.api.read_body(self.request)
        body = parse(self.kind, data)
        self.caller = self._who(body)
        self.api.check_model(body.model)
        prompt = self._prompt(body) if len(data) < LARGE_BODY else await asyncio.to_thread(self._prompt, body)
        prompt_ids, text = prompt
        if not prompt_ids:
            raise invalid("The prompt is empty.", "prompt")
        max_tokens = service.max_tokens(body.wanted_tokens(), len(prompt_ids))
        traffic_class = self.caller.traffic_class or classify(text, len(prompt_ids), max_tokens)
        running = service.start(
            self.caller,
            traffic_class,
            prompt_ids,
            body.sampling(max_tokens),
            self.request.url.path,
            body.stream,
            self.arrived,
            self.started_at,
        )
        chat = isinstance(body, ChatRequest)
        name = f"{'chatcmpl' if chat else 'cmpl'}-{running.trace_id.hex}"
        return running, Shape(name, int(self.started_at.timestamp()), service.target.name, chat), body

    def _who(self, body: ChatRequest | CompletionRequest) -> Caller:
        headers = self.request.headers
        caller = read_caller(headers, body.metadata, body.user, self.request_id)
        if (key := headers.get("idempotency-key")) is None:
            return caller
        return replace(caller, retry=max(caller.retry, self.api.repeats.count(caller.tenant, clean(key))))

    def _prompt(self, body: ChatRequest | CompletionRequest) -> tuple[list[int], str]:
        """Token ids, and the text by which a class is guessed."""
        tokenizer = self.service.target.tokenizer
        if isinstance(body, ChatRequest):
            messages = [message.plain() for message in body.messages]
            try:
                return tokenizer.apply_chat_template(messages), messages[-1]["content"]
            except SlipstreamError as error:
                raise invalid(str(error), "messages") from None
        prompt = body.prompt
        if isinstance(prompt, list):
            if all(isinstance(item, int) for item in prompt):
                return [item for item in prompt if isinstance(item, int)], ""
            if len(prompt) != 1:
                raise invalid("prompt takes one text or one list of token ids.", "prompt")
            prompt = str(prompt[0])
        return tokenizer.encode(prompt), prompt

    async def _whole(self, running: Running, shape: Shape) -> Response:
        gone = asyncio.ensure_future(_disconnected(self.request))
        collect = asyncio.ensure_future(self.service.next(running))
        try:
            await asyncio.wait({gone, collect}, return_when=asyncio.FIRST_COMPLETED)
            if not collect.done():
                self.service.cancel(running)
                return Response(status_code=CLIENT_CLOSED)
            last = collect.result()
        except ApiError as error:
            return error.response(running.headers)
        finally:
            for task in (gone, collect):
                task.cancel()
        result = last.result
        assert result is not None
        assert last.finish_reason is not None
        usage = token_usage(result.prompt_tokens, result.output_tokens)
        return JSONResponse(shape.whole(result.text, last.finish_reason, usage), headers=running.headers)

    async def _stream(self, running: Running, shape: Shape, include_usage: bool) -> Response:
        """The status is decided by the first output: what fails before it gets a status of its own."""
        gone = asyncio.ensure_future(_disconnected(self.request))
        begin = asyncio.ensure_future(self.service.next(running))
        try:
            await asyncio.wait({gone, begin}, return_when=asyncio.FIRST_COMPLETED)
            if not begin.done():
                self.service.cancel(running)
                return Response(status_code=CLIENT_CLOSED)
            first = begin.result()
        except ApiError as error:
            return error.response(running.headers)
        finally:
            gone.cancel()
            begin.cancel()
        return EventStream(self._events(running, shape, first, include_usage), running.headers)

    async def _events(
        self, running: Running, shape: Shape, first: Output, include_usage: bool
    ) -> AsyncGenerator[str, None]:
        output = first
        try:
            if shape.chat:
                yield shape.role()
            while True:
                if output.text:
                    yield shape.piece(output.text)
                if output.finished:
                    break
                output = await self.service.next(running)
            yield shape.end(output.finish_reason or FinishReason.STOP)
            if include_usage and output.result is not None:
                yield shape.usage(token_usage(output.result.prompt_tokens, output.result.output_tokens))
            yield DONE
        except ApiError as error:  # the status is sent already; the error is the last event
            yield event(error.body())
        finally:
            if not output.finished:
                self.service.cancel(running)

    def _refusal(self, error: ApiError) -> Response:
        trace_id = self.service.refuse(
            self.request_id, self.request.url.path, error, self.arrived, self.started_at, self.caller
        )
        return error.response({"x-request-id": self.request_id, "x-slipstream-trace-id": str(trace_id)})


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone. The body has been read, so nothing else can be received."""
    with contextlib.suppress(ClientDisconnect):
        while True:
            if (await request.receive())["type"] == "http.disconnect":
                return


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    message = {404: f"Unknown request URL: {what}.", 405: f"Not allowed: {what}."}.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return internal("not kept").response()
