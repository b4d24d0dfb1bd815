"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}} and the status its clients expect."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

from engine.contracts import SlipstreamError


class ApiError(SlipstreamError):
    """An answer other than success. ``param`` names the field at fault, ``code`` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        return {"error": {"message": self.message, "type": self._type(), "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(self.body(), self.status, {**self.headers, **(headers or {})})

    def _type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def internal(what: object) -> ApiError:
    """``what`` names the request or its trace, by which the log can be searched."""
    return ApiError(500, f"The server failed on this request ({what}); its log says why.", code="internal_error")
