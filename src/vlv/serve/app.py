"""The routes of a service as one ASGI application."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from vlv.serve.errors import ApiError, internal
from vlv.serve.guard import Guard
from vlv.serve.schema import first_fault
from vlv.serve.service import Service

if TYPE_CHECKING:
    from vlv.serve.settings import Keys

Route = Callable[..., Coroutine[Any, Any, Response]]


def build_app(service: Service, keys: Keys, *, local_only: bool = True) -> Guard:
    """The application.

    Args:
        service: Behind the routes; its batcher is to be started.
        keys: Who may ask.
        local_only: See `Guard`.
    """
    app = FastAPI(title="vlv", docs_url=None, redoc_url=None)  # those pages load scripts of others
    gets: dict[str, Route] = {
        "/health": service.health,
        "/ready": service.ready,
        "/metrics": service.show_metrics,
        "/v1/models": service.models,
    }
    posts: dict[str, Route] = {
        "/v1/chat/completions": service.chat,
        "/v1/ask": service.ask,
        "/v1/embed": service.embed,
        "/v1/reconstruct": service.reconstruct,
        "/v1/generate": service.generate,
        "/v1/mix": service.mix,
        "/v1/verify": service.verify,
        "/v1/search": service.search,
    }
    for path, read in gets.items():
        app.add_api_route(path, read, methods=["GET"])
    for path, work in posts.items():
        app.add_api_route(path, work, methods=["POST"])
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _failed)
    paths = {*gets, *posts, "/openapi.json"}
    return Guard(app, paths, service, keys, local_only=local_only)


async def _refused(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return JSONResponse(error.body(), error.status, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    """What pydantic found first, without what was sent."""
    if not isinstance(error, RequestValidationError):
        raise error
    where, message = first_fault(error.errors(), skip=1)
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/json":
        message = "the body is not declared as JSON; send Content-Type: application/json"
    refusal = ApiError(400, message, param=where or None, code="invalid_request")
    return JSONResponse(refusal.body(), refusal.status)


async def _no_route(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    said = {404: "there is no such route", 405: "this route takes another method"}
    message = said.get(error.status_code, "the request cannot be read")
    refusal = ApiError(error.status_code, message, code="invalid_request")
    return JSONResponse(refusal.body(), error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    """Say nothing of the inside; the guard writes the log."""
    refusal = internal()
    return JSONResponse(refusal.body(), refusal.status)
