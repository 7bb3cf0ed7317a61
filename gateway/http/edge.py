"""The outermost layer of the HTTP edge: names every request, bounds their number, counts them, answers every error."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import validate
from gateway.config import HttpLimits
from gateway.http.attend import ClientGone
from gateway.http.errors import error_headers, error_json, visible
from gateway.metrics import Metrics
from llmos.clock import Clock
from llmos.errors import (
    InternalError,
    InvalidRequest,
    LlmosError,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    PayloadTooLarge,
)

log = logging.getLogger(__name__)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_CLIENT_GONE = 499
_NAMED = (("/v1/models/", "/v1/models/{model}"), ("/v1/streams/", "/v1/streams/{id}"))
"""Paths with a name in them, as metrics have them."""
_ALWAYS = frozenset({"/health", "/live", "/ready", "/version", "/metrics"})
"""Answered however many requests run, so that probes see a busy gateway as alive."""


class Edge:
    """ASGI middleware. `routes` names a path for metrics; anything else counts as `other`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: HttpLimits,
        metrics: Metrics,
        clock: Clock,
        new_id: Callable[[], str],
        routes: frozenset[str],
    ) -> None:
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._new_id = new_id
        self._routes = routes
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one HTTP request; other protocols are not offered."""
        if scope["type"] != "http":
            return
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state.setdefault("cut", lambda: None)
        state.setdefault("wire", None)
        state.update(request_id=self._new_id(), client_request_id="")
        answer = _Answer(state, send, self._clock)
        self._active += 1
        self._metrics.http_active.inc()
        try:
            self._admit(scope, state)
            await self._app(scope, receive, answer.send)
        except LlmosError as error:
            await error_response(error, state["request_id"])(scope, receive, answer.send)
        except Exception:
            # Starlette has answered already; the stack belongs into the log, not into uvicorn's hands.
            log.exception("request %s met a bug", state["request_id"])
        finally:
            self._active -= 1
            self._metrics.http_active.dec()
            self._count(scope, answer.status)

    def _admit(self, scope: Scope, state: MutableMapping[str, Any]) -> None:
        headers = scope["headers"]
        size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(n) + len(v) + 4 for n, v in headers)
        if size > self._limits.max_header_bytes:
            raise PayloadTooLarge(f"Request line and headers are larger than {self._limits.max_header_bytes} bytes.")
        given = next((value for name, value in headers if name == b"x-request-id"), None)
        if given is not None:
            state["client_request_id"] = validate.request_id(given.decode("latin-1"))
            state["request_id"] = state["client_request_id"]
        if self._active > self._limits.max_requests and scope["path"] not in _ALWAYS:
            raise Overloaded("This gateway has as many requests as it can hold; try again.", retry_after_s=1.0)

    def _count(self, scope: Scope, status: int) -> None:
        path = scope["path"]
        named = (name for start, name in _NAMED if path.startswith(start))
        route = path if path in self._routes else next(named, "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.http_requests.labels(method, route, str(status)).inc()


class _Answer:
    """Adds to a response what every one carries: the request id and the time until here."""

    def __init__(self, state: MutableMapping[str, Any], send: Send, clock: Clock) -> None:
        self._state = state
        self._send = send
        self._clock = clock
        self._began = clock.monotonic()
        self.status = _CLIENT_GONE

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            spent_ms = int((self._clock.monotonic() - self._began) * 1000)
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-request-id", self._state["request_id"].encode("ascii", "replace")),
                (b"openai-processing-ms", b"%d" % spent_ms),
            ]
        await self._send(message)


def error_response(error: LlmosError, request_id: str, headers: dict[str, str] | None = None) -> Response:
    """OpenAI's error object as a response."""
    response = Response(
        error_json(error, request_id), error.http_status, headers=headers, media_type="application/json"
    )
    response.raw_headers.extend(error_headers(error))
    return response


async def on_llmos_error(request: Request, error: Exception) -> Response:
    """Answer a typed error."""
    shown = visible(error)
    if isinstance(shown, InternalError):
        log.error("request %s met a bug", request.scope["state"]["request_id"], exc_info=error)
    return error_response(shown, request.scope["state"]["request_id"])


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer what the router could not place."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    asked = f"{request.method} {request.url.path[:200]}"
    typed: LlmosError
    if status == 404:
        typed = NotFound(f"There is no {asked}.")
    elif status == 405:
        typed = MethodNotAllowed(f"{asked} is not possible; allowed: {headers.get('Allow', 'another method')}.")
    else:
        typed = InvalidRequest(f"{asked} could not be understood.") if status < 500 else InternalError("router")
    return error_response(typed, request.scope["state"]["request_id"], headers)


async def on_bug(request: Request, error: Exception) -> Response:
    """Answer what nobody expected. The stack goes to the log."""
    return error_response(InternalError("bug"), request.scope["state"]["request_id"])


async def on_client_gone(request: Request, error: Exception) -> Response:
    """Nobody is left to answer; counted as 499."""
    return Response(status_code=_CLIENT_GONE)


__all__ = ["ClientGone", "Edge", "error_response", "on_bug", "on_client_gone", "on_http_exception", "on_llmos_error"]
