"""Refusals in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping

from vlv.errors import ConfigError, DataError, EndpointError, MissingPartError
from vlv.storage import Json

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that gets no result.

    Args:
        status: Of HTTP.
        message: One sentence that says what is wrong and how to mend it; it names no path of this machine.
        param: The field of the request that is wrong.
        code: For programs.
        headers: More headers of the answer.
    """

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
        self.status, self.code = status, code
        self.message, self.param = _sendable(message), param and _sendable(param)
        self.headers = dict(headers or {})

    def body(self) -> Json:
        """What is sent."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, default),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def _sendable(text: str) -> str:
    """A text that may repeat what a client sent, without lone surrogates and not too long."""
    return text[:500].encode("utf-8", "replace").decode("utf-8")


class ClientLeftError(ApiError):
    """Nobody waits for the answer any more."""

    def __init__(self) -> None:
        super().__init__(499, "the client left")


def overloaded(seconds: int) -> ApiError:
    """The refusal of a request for which there is no room."""
    return ApiError(
        429,
        f"the server has as much to do as it may take on; try again in {seconds} s",
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


def too_often(seconds: int) -> ApiError:
    """The refusal of a request that its key may not make yet."""
    return ApiError(
        429,
        f"this key has made all the requests that it may make; try again in {seconds} s",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )


def draining() -> ApiError:
    """The refusal of a server that is about to end."""
    return ApiError(
        503, "the server is shutting down", code="draining", headers={"Retry-After": "10"}
    )


def internal() -> ApiError:
    """The refusal where the fault is ours; it tells nothing of the inside."""
    return ApiError(
        500, "the server failed; its log has this request's X-Request-ID", code="internal_error"
    )


def as_api_error(error: Exception) -> ApiError:
    """The refusal for an error of the model."""
    match error:
        case ApiError():
            return error
        case MissingPartError():
            return ApiError(
                501, "the model that is served has no part for this", code="unsupported"
            )
        case ConfigError() | DataError():
            return ApiError(400, str(error), code="invalid_value")
        case EndpointError():
            return ApiError(
                503, "the engine that writes captions is not there; try again later", code="engine"
            )
    return internal()
